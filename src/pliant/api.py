"""The Python API: what `pliant.fit`, `load`, `measure`, `plan`, `inspect` and `bench` are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from torch import Tensor

from pliant.bench import (
    bench_artifact,
    bench_kernels,
    costs_of_artifact,
    costs_of_config,
    predicted_speed,
    products_of_config,
)
from pliant.budget import parse_size
from pliant.errors import PliantError
from pliant.fit import FitResult, fit
from pliant.ladder import Artifact
from pliant.ladder.document import FILE_NAME
from pliant.ladder.live import Plan, plan_opening
from pliant.measure import WINDOW, load_text, split, windows
from pliant.measure import measure as compare
from pliant.measure.damage import Progress, Score
from pliant.model import Checkpoint, StreamedModel, find_device, open_checkpoint
from pliant.plan import PlanTable, load_config
from pliant.plan import plan as plan_table
from pliant.run import load

__all__ = ["FitResult", "bench", "fit", "inspect", "load", "measure", "plan"]

CLIMB_POINTS = 12
WIDTHS = {16: "bf16", **{bits: f"int{bits}" for bits in (8, 6, 5, 4, 3, 2)}}  # of a plan's rows


def plan(
    source: Any,
    memory: int | str | None = None,
    *,
    context: int = 2048,
    batch: int = 1,
    timed: bool = True,
    progress: Progress | None = None,
) -> PlanTable:
    """What fits where: bytes, longest context and decode speed of `source` at each bit width.

    source: a configuration, a directory, a hub id, a .gguf file or "smollm2"; no weight is read.
    memory: bytes or text ("128MiB"); without it, what this machine has free. timed: predict the
    speed from products of these widths and shapes, which are timed the first time that they are
    asked for, and kept; without, only the ceiling that the memory's bandwidth sets is told.
    """
    bound = None if memory is None else parse_size(memory)
    if not timed:
        return plan_table(source, bound, context=context, batch=batch)
    config = load_config(source)
    device = find_device("auto")
    costs = costs_of_config(config, WIDTHS.values(), device, batch=batch, progress=progress)

    def seconds(bits: int, position: int) -> float | None:
        return costs.seconds(products_of_config(config, WIDTHS[bits]), position) if costs else None

    return plan_table(source, bound, context=context, batch=batch, config=config, seconds=seconds)


def bench(
    directory: str | Path | None = None,
    memory: int | str | Sequence[int | str] = (),
    weights: int | str | Sequence[int | str] = (),
    *,
    device: str = "auto",
    quick: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Speed on this machine beside the speed of its memory, JSON-able.

    Without `directory`, products of the common codes at a few shapes and batches. With one, the
    decode and prefill tokens a second of an artifact at each total in `memory` and each number of
    bytes of `weights`, measured and predicted; without sizes, at the smallest, a middle and the
    largest. device: "auto" is a GPU when there is one. quick: less of everything. progress: told
    (stage, done, of).
    """
    place = find_device(device)
    if directory is None:
        if memory or weights:
            raise PliantError("memory and weights are sizes of an artifact; give its directory")
        return bench_kernels(
            place, quick=quick, progress=progress and (lambda d, of: progress("products", d, of))
        )
    return bench_artifact(
        directory, _several(memory), _several(weights), place, quick=quick, progress=progress
    )


def measure(
    model: Any,
    against: Any,
    text: str | Path | Tensor,
    *,
    tokenizer: Any = None,
    memory: int | str | None = None,
    weights: int | str | None = None,
    window: int = WINDOW,
    score: Score = "half",
    part: Literal["all", "evaluation", "calibration"] = "all",
    limit: int | None = None,
    timed: bool = True,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Damage, perplexity, top-1 agreement, bytes and speed of `model` beside the original.

    model, against: an opened model, an artifact's directory, or what `fit` takes as a source.
    text: a file, a text, or windows of token ids [n, window]. part: "evaluation" (the first 60%)
    or "calibration" (the last 30%) of it. memory, weights: the size that an artifact opens at.
    score: "half" of each window or "all". timed: measure tokens a second too. progress: (done, of).
    """
    mine = find(model, trust_remote_code)
    original = find(against, trust_remote_code)
    ids = text if isinstance(text, Tensor) else _windows(
        text, tokenizer or _tokenizer(original) or _tokenizer(mine), window, limit, part
    )  # fmt: skip
    found = compare(
        opened(mine, memory, weights),
        opened(original),
        ids,
        score=score,
        limit=limit,
        timed=timed,
        key=original.fingerprint() if isinstance(original, Checkpoint) else None,
        progress=progress,
    )
    if isinstance(mine, Checkpoint):  # held in 32 bits only to be computed with
        found["weight_bytes"] = mine.nbytes
    return found


def inspect(
    directory: str | Path,
    memory: int | str | None = None,
    weights: int | str | None = None,
    *,
    verify: bool = False,
    timed: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Rungs, climb and allocation of an artifact at a size, JSON-able.

    verify: read every byte. timed: predict tokens a second, half of the context filled; products of
    kinds and shapes that this machine has not timed before are timed first (progress: done, of).
    """
    artifact = Artifact.open(directory)
    if verify:
        artifact.verify()
    ladder, opening = artifact.ladder, plan_opening(artifact, memory, weights)
    speed = decode_speed(artifact, opening, progress) if timed else None
    rungs = {
        target: [
            {"rung": r.index, "method": r.method, "options": r.options, "nbytes": r.nbytes,
             "damage": r.damage}
            for r in own
        ]
        for target, own in ladder.rungs.items()
    }  # fmt: skip
    return {
        "path": str(directory),
        "verified": verify,
        "budget": artifact.document.budget,
        "memory": opening.memory,
        "planned_bytes": opening.planned_bytes,
        "breakdown": opening.breakdown.as_dict(),
        "weight_bytes": opening.weight_bytes,
        "bits": bits_of(artifact, opening.weight_bytes),
        "damage": ladder.damage_at(opening.weight_bytes),
        "smallest_bytes": ladder.smallest_bytes,
        "largest_bytes": ladder.largest_bytes,
        "original_bytes": artifact.provenance.get("original_bytes"),
        "fixed_bytes": ladder.fixed_bytes,
        "steps": len(ladder.climb),
        "tokens_per_second": speed(opening.allocation) if speed else None,
        "climb": [
            point
            | {
                "tokens_per_second": speed(ladder.allocation(point["weight_bytes"]))
                if speed
                else None
            }
            for point in climb_summary(artifact)
        ],
        "allocation": allocation(artifact, opening),
        "rungs": rungs,
        "provenance": artifact.provenance,
    }


def decode_speed(
    artifact: Artifact, opening: Plan, progress: Progress | None = None
) -> Callable[[Mapping[str, int]], float | None]:
    """Predicts tokens a second of an allocation, at an opening's batch and half of its context."""
    costs = costs_of_artifact(artifact, batch=opening.batch, progress=progress)
    return lambda allocation: predicted_speed(
        artifact, allocation, costs, opening.context // 2, opening.batch
    )


def allocation(artifact: Artifact, opening: Plan) -> list[dict[str, Any]]:
    """The open rung of every target: where it is in the model, its method, bytes and bits."""
    cells = []
    for target in artifact.targets:
        rung = artifact.ladder.rungs[target["name"]][opening.allocation[target["name"]]]
        numbers = target["shape"][0] * target["shape"][1]
        cells.append(
            {"target": rung.target, "block": target["block"], "role": target["role"],
             "rung": rung.index, "method": rung.method, "options": rung.options,
             "nbytes": rung.nbytes, "numbers": numbers, "bits": 8 * rung.nbytes / numbers}
        )  # fmt: skip
    return cells


def climb_summary(artifact: Artifact, points: int = CLIMB_POINTS) -> list[dict[str, Any]]:
    """Sizes from the ladder's smallest to its largest with their bits and predicted damage."""
    ladder = artifact.ladder
    low, high = ladder.smallest_bytes, ladder.largest_bytes
    sizes = [low + (high - low) * i // (points - 1) for i in range(points)]
    found = [max(p for p in ladder.frontier() if p[0] <= size) for size in dict.fromkeys(sizes)]
    return [
        {"weight_bytes": size, "bits": bits_of(artifact, size), "damage": damage}
        for size, damage in dict.fromkeys(found)
    ]


def bits_of(artifact: Artifact, weight_bytes: int) -> float:
    """Bits a weight, fixed tensors and scales included."""
    numbers: int = sum(t["shape"][0] * t["shape"][1] for t in artifact.targets)
    return 8 * weight_bytes / numbers


def find(source: Any, trust_remote_code: bool = False) -> Any:
    """An Artifact or a Checkpoint for what names one; an opened model as it is."""
    if not isinstance(source, (str, Path)):
        return source
    if (Path(source) / FILE_NAME).exists():
        return Artifact.open(source)
    return open_checkpoint(source, trust_remote_code=trust_remote_code)


def opened(source: Any, memory: int | str | None = None, weights: int | str | None = None) -> Any:
    """The model of what `find` found: an artifact at a size, a checkpoint in 32 bits.

    A checkpoint that does not fit in this machine's memory is read layer by layer as it runs.
    """
    if isinstance(source, Artifact):
        return load(source.directory, memory, weights)
    if memory is not None or weights is not None:
        raise PliantError(
            "memory and weights choose the size at which an artifact opens, and this is none; "
            "leave them out, or give a directory that `fit` wrote"
        )
    if not isinstance(source, Checkpoint):
        return source
    if 4 * source.nbytes // source.dtype.itemsize > psutil.virtual_memory().available:
        return StreamedModel(source).module
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        source.directory, dtype=torch.float32, trust_remote_code=source.trust_remote_code
    )
    return model.eval()


def _tokenizer(source: Any) -> Any:
    artifact = getattr(source, "artifact", source)
    return artifact.tokenizer() if isinstance(artifact, (Artifact, Checkpoint)) else None


def _windows(text: str | Path, tokenizer: Any, window: int, limit: int | None, part: str) -> Tensor:
    if tokenizer is None:
        raise PliantError(
            "two opened models need tokenizer=... to read a text, or windows of token ids"
        )
    if isinstance(text, Path) or _names_file(text):
        text = load_text(text)
    if part != "all":
        text = split(text, part)  # type: ignore[arg-type]
    return windows(text, tokenizer, window, limit)


def _several(sizes: int | str | Sequence[int | str]) -> Sequence[int | str]:
    return [sizes] if isinstance(sizes, (int, str)) else sizes


def _names_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # too long for a name, or with a zero in it
        return False
