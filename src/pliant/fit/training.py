"""The training stage of a fit: text to train on, and trained rungs in shards of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file
from torch import Tensor

from pliant.fit.recipe import Recipe
from pliant.fit.scratch import store
from pliant.fit.tune import tune
from pliant.ladder import Ladder, Proposal, Rung, Writer
from pliant.model import StreamedModel, Target
from pliant.observe import write_text
from pliant.plan.memory import kv_cache_bytes

Progress = Callable[[str, int, int], None]
_SEED = 7  # added to the recipe's: other text than calibration's


def training_text(
    model: StreamedModel, recipe: Recipe, calibration: Tensor, work: Path, report: Progress
) -> Tensor:
    """Ids [n, T]: what the model writes itself, and the calibration text."""
    path = work / "training.safetensors"
    if path.exists():
        kept: Tensor = load_file(path)["ids"]
        return kept
    length, wanted = recipe.calibration.length, recipe.tune.sequences
    at_once = min(wanted, _at_once(model, length))
    parts = [calibration]
    for start in range(0, wanted, at_once):
        parts.append(
            write_text(
                model, min(at_once, wanted - start), length, seed=recipe.seed + _SEED + start,
                progress=lambda d, of: report("writing training text", d, of),
            )
        )  # fmt: skip
    found = torch.cat(parts)
    store(path, {"ids": found})
    return found


def _at_once(model: StreamedModel, length: int) -> int:
    """Sequences whose cache takes a quarter of what is free."""
    if model.device.type == "cuda":
        free = torch.cuda.mem_get_info(model.device)[0]
    else:
        free = psutil.virtual_memory().available
    return max(1, free // 4 // max(1, kv_cache_bytes(model.config, length, 1)))


def trained_rungs(
    writer: Writer,
    model: StreamedModel,
    ladder: Ladder,
    ids: Tensor,
    recipe: Recipe,
    work: Path,
    report: Progress,
) -> dict[str, list[Rung]]:
    """The ladder's rungs, those that training changed read from new shards."""
    shards = _shards(model.targets)
    if not all(writer.has(name) for name in shards):
        tuned = tune(
            model, ladder, lambda target, index: writer.load_code(ladder.rungs[target][index]),
            ids, recipe.tune, seed=recipe.seed, work=work,
            progress=lambda d, of: report("training", d, of),
        )  # fmt: skip
        for name, targets in shards.items():
            changed = [
                Proposal(rung.target, rung.method, rung.options, code, rung.damage)
                for (target, index), code in tuned.items()
                if target in targets
                for rung in [ladder.rungs[target][index]]
            ]
            writer.write(name, changed)
    rungs = {target: {r.nbytes: r for r in own} for target, own in ladder.rungs.items()}
    for name in shards:
        for rung in writer.rungs(name):  # of as many bytes as the one in whose place it is
            rungs[rung.target][rung.nbytes] = rung
    return {target: [own[size] for size in sorted(own)] for target, own in rungs.items()}


def _shards(targets: Sequence[Target]) -> Mapping[str, set[str]]:
    """Names of the shards for trained rungs, with their targets."""
    found: dict[str, set[str]] = {}
    for target in targets:
        name = "trained-outer" if target.block is None else f"trained-{target.block:05d}"
        found.setdefault(name, set()).add(target.name)
    return found
