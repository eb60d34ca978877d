"""Stages of a fit that make rungs better together; what they change has shards of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file
from torch import Tensor

from pliant.codes import Code
from pliant.fit.planning import Rungs
from pliant.fit.recipe import Recipe, Reconstruct, Tune
from pliant.fit.reconstruct import reconstruct
from pliant.fit.scratch import store
from pliant.fit.tune import Key, tune
from pliant.ladder import Ladder, Proposal, Rung, Writer
from pliant.model import StreamedModel, Target
from pliant.observe import write_text
from pliant.plan.memory import kv_cache_bytes

Progress = Callable[[str, int, int], None]
_TOGETHER = 512  # sequences written at a time: where memory allows, the same text everywhere
_SEED = 7  # added to the recipe's: other text than calibration's


def training_text(
    model: StreamedModel, recipe: Recipe, calibration: Tensor, work: Path, report: Progress
) -> Tensor:
    """Ids [n, T]: what the model writes itself, and the calibration text [m, T]."""
    path = work / "training.safetensors"
    if path.exists():
        kept: Tensor = load_file(path)["ids"]
        return kept
    length, wanted = recipe.calibration.length, recipe.tune.sequences
    at_once = min(_TOGETHER, _at_once(model, length))
    parts = [calibration]
    for start in range(0, wanted, at_once):
        count, seed = min(at_once, wanted - start), recipe.seed + _SEED + start
        parts.append(written(model, calibration, recipe.tune, count, length, seed))
        report("writing training text", start + count, wanted)
    found = torch.cat(parts)
    store(path, {"ids": found})
    return found


def written(
    model: StreamedModel, calibration: Tensor, settings: Tune, count: int, length: int, seed: int
) -> Tensor:
    """Ids [count, length] that the model writes as `settings` says."""
    prompted = round(count * settings.prompted)
    prompts = cut_prompts(calibration, prompted, settings.prompt, seed)
    return write_text(
        model, count, length, seed=seed, prompts=prompts, temperature=settings.temperature
    )


def cut_prompts(text: Tensor, count: int, length: int, seed: int) -> Tensor | None:
    """Pieces [count, length] of the sequences [m, T] at random places; None without text."""
    if not len(text) or not length or not count:
        return None
    length = min(length, text.shape[1])
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(text), (count, 1), generator=generator)
    starts = torch.randint(text.shape[1] - length + 1, (count, 1), generator=generator)
    return text[rows, starts + torch.arange(length)]


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

    def train() -> dict[Key, Code]:
        return tune(
            model, ladder, lambda target, index: writer.load_code(ladder.rungs[target][index]),
            ids, recipe.tune, seed=recipe.seed, work=work,
            progress=lambda d, of: report("training", d, of),
        )  # fmt: skip

    return _replaced(writer, model.targets, ladder.rungs, "trained", train)


def reconstructed_rungs(
    writer: Writer,
    model: StreamedModel,
    rungs: Rungs,
    ids: Tensor,
    settings: Reconstruct,
    report: Progress,
) -> dict[str, list[Rung]]:
    """`rungs` after a reconstruction method went over each level: all first rungs, all second ..

    A level is a whole model, so each layer is fitted to what the layers before it bring at about
    its own size.
    """
    levels = max(len(own) for own in rungs.values())

    def rebuild() -> dict[Key, Code]:
        changed: dict[Key, Code] = {}
        for level in range(levels):
            at = {target: min(level, len(own) - 1) for target, own in rungs.items()}
            codes = {target: writer.load_code(rungs[target][i]) for target, i in at.items()}
            found = reconstruct(
                model, ids, codes, settings.method, settings.options, window=settings.window,
                progress=lambda d, of, level=level: report(  # type: ignore[misc]
                    "reconstructing", level * of + d, levels * of
                ),
            )  # fmt: skip
            changed |= {
                (target, level): code.to("cpu")
                for target, code in found.items()
                if code is not codes[target] and level < len(rungs[target])
            }
        return changed

    return _replaced(writer, model.targets, rungs, "rebuilt", rebuild)


def _replaced(
    writer: Writer,
    targets: Sequence[Target],
    rungs: Rungs,
    stage: str,
    make: Callable[[], dict[Key, Code]],
) -> dict[str, list[Rung]]:
    """`rungs`, those that `make` changed read from shards of that stage, written when missing.

    A changed rung has as many bytes as the one in whose place it is.
    """
    shards: dict[str, set[str]] = {}
    for target in targets:
        name = f"{stage}-outer" if target.block is None else f"{stage}-{target.block:05d}"
        shards.setdefault(name, set()).add(target.name)
    if not all(writer.has(name) for name in shards):
        changed = make()
        for name, own in shards.items():
            proposals = [
                Proposal(rung.target, rung.method, rung.options, code, rung.damage)
                for (target, index), code in changed.items()
                if target in own
                for rung in [rungs[target][index]]
            ]
            writer.write(name, proposals)
    found = {target: {rung.nbytes: rung for rung in own} for target, own in rungs.items()}
    for name in shards:
        for rung in writer.rungs(name):
            found[rung.target][rung.nbytes] = rung
    return {target: [own[size] for size in sorted(own)] for target, own in found.items()}
