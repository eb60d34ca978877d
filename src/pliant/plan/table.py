"""What fits where: a model's bytes, context and decode speed at each size, from its configuration.

No weight is read: parameters are counted on a model built without storage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from transformers import AutoConfig, AutoModelForCausalLM

from pliant.budget import format_size
from pliant.errors import CheckpointError, UnsupportedModelError
from pliant.plan.bandwidth import Bandwidth, bandwidth
from pliant.plan.memory import activation_bytes, kv_cache_bytes, text_config

SIZES = (16, 8, 6, 5, 4, 3, 2)
GROUP = 64
_LONGEST = 1 << 24


@dataclass(frozen=True)
class Parameters:
    """Counts of a model's numbers, tied ones once.

    matrices: those that are compressed, without embeddings. embeddings: the input embedding, and
    the head where it is its own matrix. others: norms, biases, kept at 16 bits. read: the share of
    the matrices and embeddings that a decoded token reads (not the untied input embedding, and of
    the experts only those that are chosen).
    """

    matrices: int
    embeddings: int
    others: int
    read: float

    @property
    def total(self) -> int:
        return self.matrices + self.embeddings + self.others


@dataclass(frozen=True)
class PlanRow:
    """One size. `max_context` is 0 where the weights alone do not fit; sizes are bytes.

    tokens_per_second: of decoding, as predicted; the ceiling where nothing predicts it. ceiling:
    what the memory's bandwidth allows. Both with the cache half full.
    """

    bits: int
    code_bits: float
    weights: int
    embeddings: int
    total: int
    fits: bool
    max_context: int
    tokens_per_second: float
    ceiling: float


@dataclass(frozen=True)
class PlanTable:
    """`memory` is the budget; `given` says whether the user gave it or this machine has it free.

    predicted: whether every row's speed is a prediction, not the ceiling.
    """

    model: str
    parameters: Parameters
    memory: int
    given: bool
    context: int
    batch: int
    kv_cache_per_1k: int
    kv_cache: int
    activations: int
    bandwidth: Bandwidth
    predicted: bool
    rows: tuple[PlanRow, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self) | {"parameters": {**asdict(self.parameters),
                                              "total": self.parameters.total},
                               "rows": [asdict(row) for row in self.rows]}  # fmt: skip


def plan(
    source: Any,
    memory: int | None = None,
    *,
    context: int = 2048,
    batch: int = 1,
    sizes: Sequence[int] = SIZES,
    speed: Bandwidth | None = None,
    config: Any = None,
    seconds: Callable[[int, int], float | None] | None = None,
) -> PlanTable:
    """The table for `source`: a configuration, a directory, a hub id, a .gguf file or "smollm2".

    memory: bytes; without it, what this machine has free. speed: memory bandwidth; without it, this
    machine's, measured once. config: of `source`, if it is known already. seconds: predicts a
    token's for (bits, tokens in the cache); without it, speeds are the bandwidth's ceiling.
    """
    config = load_config(source) if config is None else config
    counts = count_parameters(config)
    speed = speed or bandwidth()
    budget = memory or int(psutil.virtual_memory().available)
    cache = kv_cache_bytes(config, context, batch)
    activations = activation_bytes(config, context, batch)
    limit = getattr(text_config(config), "max_position_embeddings", None) or _LONGEST
    rows, predicted = [], True
    for bits in sizes:
        stored = code_bits(bits)
        embeddings = round(counts.embeddings * stored / 8)
        weights = round(counts.matrices * stored / 8) + counts.others * 2
        total = weights + embeddings + cache + activations
        read = (weights + embeddings) * counts.read + cache / 2
        longest = largest_context(config, budget - weights - embeddings, batch, int(limit))
        ceiling = batch * speed.bytes_per_second / read
        took = seconds(bits, context // 2) if seconds else None
        predicted = predicted and took is not None
        rows.append(
            PlanRow(bits, stored, weights, embeddings, total, total <= budget, longest,
                    ceiling if took is None else batch / took, ceiling)
        )  # fmt: skip
    return PlanTable(
        model=source if isinstance(source, str) else model_name(source, config),
        parameters=counts,
        memory=budget,
        given=memory is not None,
        context=context,
        batch=batch,
        kv_cache_per_1k=kv_cache_bytes(config, 1024, 1),
        kv_cache=cache,
        activations=activations,
        bandwidth=speed,
        predicted=predicted,
        rows=tuple(rows),
    )


def code_bits(bits: int) -> float:
    """Stored bits per weight: the integer, and a 16-bit scale and a zero for each group of 64."""
    return 16.0 if bits >= 16 else bits + (16 + bits) / GROUP


def largest_context(config: Any, left: int, batch: int, limit: int) -> int:
    """Most tokens (at most `limit`) whose cache and activations fit in `left` bytes; 0 if none."""

    def fits(context: int) -> bool:
        return (
            kv_cache_bytes(config, context, batch) + activation_bytes(config, context, batch)
            <= left
        )

    if not fits(1):
        return 0
    low, high = 1, limit + 1  # fits(low), and nothing at or above high is allowed
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def count_parameters(config: Any) -> Parameters:
    """Counts on a model built on the meta device."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(text_config(config))
    except ValueError as error:
        raise UnsupportedModelError(
            f"transformers has no decoder-only model for {getattr(config, 'model_type', config)!r}"
        ) from error
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tables = {id(m.weight) for m in (head, embedding) if m is not None}
    tied = head is not None and head.weight is embedding.weight
    text = text_config(config)
    chosen = next((v for n in ("num_experts_per_tok", "num_experts_per_token", "moe_topk")
                   if (v := getattr(text, n, None))), None)  # fmt: skip
    matrices = embeddings = others = 0
    read = 0.0
    for parameter in model.parameters():  # each storage once
        count = parameter.numel()
        if id(parameter) in tables:
            embeddings += count
            read += count if tied or parameter is not embedding.weight else 0
        elif parameter.ndim >= 2:
            matrices += count
            share = min(1.0, chosen / parameter.shape[0]) if parameter.ndim == 3 and chosen else 1
            read += count * share
        else:
            others += count
    return Parameters(matrices, embeddings, others, read / max(1, matrices + embeddings))


def load_config(source: Any) -> Any:
    """The configuration of `source`; nothing else of it is read."""
    if not isinstance(source, (str, Path)):
        return getattr(source, "config", source)
    if Path(source).is_dir() or not (str(source) == "smollm2" or str(source).endswith(".gguf")):
        try:
            return AutoConfig.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"no configuration for {str(source)!r}: it is neither a directory with a "
                "config.json nor a model of the Hugging Face hub that can be reached from here; "
                "pass a local directory"
            ) from error
    from pliant.model import open_checkpoint

    return open_checkpoint(source).config


def model_name(source: Any, config: Any) -> str:
    """What to call it in a heading."""
    if isinstance(source, Path):
        return source.name
    return str(getattr(config, "_name_or_path", "") or getattr(config, "model_type", "model"))


def render(table: PlanTable) -> RenderableType:
    """The table for a terminal."""
    heading = Text.assemble(
        (table.model, "bold"),
        f"  {table.parameters.total / 1e6:,.1f}M parameters, "
        f"{table.parameters.embeddings / table.parameters.total:.0%} of them embeddings",
    )
    grid = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for title in ("bits", "weights", "embeddings", "in use", "fits", "longest context", "tokens/s",
                  *["ceiling"] * table.predicted):  # fmt: skip
        grid.add_column(title, justify="right")
    for row in table.rows:
        grid.add_row(
            f"{row.bits}",
            format_size(row.weights),
            format_size(row.embeddings),
            format_size(row.total),
            "yes" if row.fits else "no",
            f"{row.max_context:,}" if row.max_context else "-",
            f"{row.tokens_per_second:,.1f}",
            *[f"{row.ceiling:,.1f}"] * table.predicted,
            style=None if row.fits else "dim",
        )
    ceiling = f"{table.bandwidth.bytes_per_second / 1e9:,.1f} GB/s of memory"
    said = (
        f"predicted from products timed on this machine; ceiling is what {ceiling} allow"
        if table.predicted
        else f"the ceiling that {ceiling} set"
    )
    whose = "budget" if table.given else "free on this machine"
    notes = Text(
        f"{format_size(table.memory)} {whose}; context {table.context:,}, batch {table.batch}: "
        f"KV cache {format_size(table.kv_cache)} ({format_size(table.kv_cache_per_1k)} per 1k "
        f"tokens), activations {format_size(table.activations)}.\n"
        f"Sizes include a 16-bit scale and a zero per group of {GROUP}. tokens/s is of decoding "
        f"with the cache half full: {said} ({table.bandwidth.device}).",
        style="dim",
    )
    return Group(heading, Text(), grid, Text(), notes)
