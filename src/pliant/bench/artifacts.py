"""An artifact's tokens a second at its sizes, measured and predicted, beside the memory's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from pliant.bench.calibrate import costs_of_artifact, products_of_artifact
from pliant.errors import PliantError
from pliant.ladder import Artifact
from pliant.ladder.live import Plan, plan_opening
from pliant.measure import speed
from pliant.model import code_of
from pliant.plan.bandwidth import bandwidth, processor_name
from pliant.plan.memory import kv_cache_bytes
from pliant.plan.speed import Costs, reads
from pliant.run import load

Size = int | str
Progress = Callable[[str, int, int], None]

PROMPT, ANSWER = 256, 32
QUICK_PROMPT, QUICK_ANSWER = 32, 8


def bench_artifact(
    directory: Any,
    memory: Sequence[Size] = (),
    weights: Sequence[Size] = (),
    device: torch.device | str = "cpu",
    *,
    quick: bool = False,
    progress: Progress | None = None,
    pace: Callable[..., Any] = speed,
) -> dict[str, Any]:
    """Decode and prefill at each size of `memory` (totals) and `weights` (their bytes alone).

    Without sizes: the smallest, the middle and the largest; with `quick` the one fitted for.
    pace: measures a model (`measure.speed`). progress: told (stage, done, of).
    """
    device = torch.device(device)
    artifact = Artifact.open(directory)
    plans = openings(artifact, memory, weights, quick)
    prompt, answer = _lengths(artifact, plans[0], quick)
    position = prompt + answer // 2
    costs = costs_of_artifact(
        artifact, device, progress=progress and (lambda d, of: progress("this machine", d, of))
    )
    ceiling = bandwidth(device, refresh=True).bytes_per_second
    model = load(
        artifact.directory, weights=plans[0].weight_bytes, context=plans[0].context, device=device
    )
    rows: list[dict[str, Any]] = []
    for plan in plans:
        if progress:
            progress("sizes", len(rows), len(plans))
        if model.plan.weight_bytes != plan.weight_bytes:
            model.resize(weights=plan.weight_bytes)
        found = pace(model, prompt, answer, repeats=1 if quick else 3)
        read = token_bytes(artifact, model, position)
        rows.append(
            {"memory": plan.memory, "weight_bytes": plan.weight_bytes,
             "decode_tps": found.decode_tps, "prefill_tps": found.prefill_tps,
             "predicted_tps": predicted_speed(artifact, plan.allocation, costs, position),
             "token_bytes": read, "bytes_per_second": read * found.decode_tps,
             "share": read * found.decode_tps / ceiling}
        )  # fmt: skip
    if progress:
        progress("sizes", len(plans), len(plans))
    return {
        "path": str(directory), "device": processor_name(device), "prompt_tokens": prompt,
        "new_tokens": answer, "read_bytes_per_second": ceiling, "rows": rows,
    }  # fmt: skip


def openings(
    artifact: Artifact, memory: Sequence[Size], weights: Sequence[Size], quick: bool
) -> list[Plan]:
    """What the artifact opens with at each size asked for, each size once, rising."""
    plans = [plan_opening(artifact, memory=size) for size in memory]
    plans += [plan_opening(artifact, weights=size) for size in weights]
    if not plans and quick:
        plans = [plan_opening(artifact)]
    if not plans:
        low, high = artifact.ladder.smallest_bytes, artifact.ladder.largest_bytes
        plans = [plan_opening(artifact, weights=s) for s in (low, (low + high) // 2, high)]
    return sorted({p.weight_bytes: p for p in plans}.values(), key=lambda p: p.weight_bytes)


def predicted_speed(
    artifact: Artifact,
    allocation: Mapping[str, int],
    costs: Costs | None,
    position: int,
    batch: int = 1,
) -> float | None:
    """Tokens a second of `batch` sequences with these rungs and `position` tokens in the cache."""
    products = products_of_artifact(artifact, allocation)
    seconds = costs.seconds(products, position) if costs else None
    return None if seconds is None else batch / seconds


def token_bytes(artifact: Artifact, model: Any, position: int) -> float:
    """What a token reads: the codes that it multiplies, the fixed tensors, the filled cache."""
    config = artifact.config()
    weights = sum(
        code_of(model, t["name"]).nbytes * reads(config, t["kind"], bool(t["tied"]))
        for t in artifact.targets
    )
    return weights + artifact.ladder.fixed_bytes + kv_cache_bytes(config, position, 1)


def _lengths(artifact: Artifact, plan: Plan, quick: bool) -> tuple[int, int]:
    """Tokens of the prompt and of the answer: less where the model was made for less."""
    prompt, answer = (QUICK_PROMPT, QUICK_ANSWER) if quick else (PROMPT, ANSWER)
    text = artifact.config().get_text_config(decoder=True)
    longest = getattr(text, "max_position_embeddings", None) or prompt + answer
    if longest < 4:
        raise PliantError(f"{artifact.directory} takes {longest} tokens; too few to time")
    answer = min(answer, longest // 2)
    return min(prompt, longest - answer), answer
