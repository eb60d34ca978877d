"""Which text a fit calibrates on: read or written candidates, and the choice among them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pliant.fit.recipe import Recipe
from pliant.fit.scratch import store
from pliant.methods import find
from pliant.model import StreamedModel
from pliant.observe import (
    Candidates,
    Selection,
    choose_windows,
    digest,
    load_text,
    mean_states,
    perturbed_losses,
    windows,
    write_text,
)

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Pool:
    """What there is to choose from: ids [n, T], None where the model has yet to write them.

    sources [n]: which of the recipe's texts each window is from. target: the text to be matched.
    """

    ids: Tensor | None = None
    sources: Tensor | None = None
    target: str | None = None

    def digest(self) -> str | None:
        """A fingerprint of all that was read; None when nothing was."""
        parts = [] if self.ids is None else [digest(self.ids)]
        if self.target is not None:
            parts.append(hashlib.sha256(self.target.encode()).hexdigest()[:16])
        return " ".join(parts) or None


def read_pool(recipe: Recipe, tokenizer: Any) -> Pool:
    """The windows of the recipe's texts, shuffled, each text's cut to its part of `candidates`.

    tokenizer: of the model; None will do where the recipe names no text.
    """
    settings = recipe.calibration
    target = None if settings.target is None else load_text(settings.target)
    if settings.text is None:
        return Pool(target=target)
    paths = (settings.text,) if isinstance(settings.text, str) else settings.text
    found = [windows(load_text(path), tokenizer, settings.length) for path in paths]
    if settings.select != "random":
        each = -(-(settings.candidates + recipe.search.sequences) // len(found))
        found = [choose_windows(own, each, seed=recipe.seed) for own in found]
    sources = torch.arange(len(found)).repeat_interleave(torch.tensor([len(own) for own in found]))
    return Pool(torch.cat(found), sources, target)


def calibration_text(
    model: StreamedModel,
    recipe: Recipe,
    pool: Pool,
    work: Path,
    resident: Callable[[], StreamedModel],
    *,
    held_out: int,
    report: Callable[[str, int, int], None],
) -> tuple[Tensor, Tensor | None]:
    """What `choose` chose, kept in the directory `work` for a run that goes on later.

    resident: gives the model that writes the candidates where none were read.
    """
    path, drafts = work / "calibration.safetensors", work / "candidates.safetensors"
    if path.exists():
        kept = load_file(path)
        return kept["ids"], kept.get("weights")
    settings = recipe.calibration
    ids = pool.ids
    if ids is None and drafts.exists():
        ids = load_file(drafts)["ids"]
    if ids is None:
        wanted = settings.sequences if settings.select == "random" else settings.candidates
        ids = write_text(
            resident(), wanted + recipe.search.sequences, settings.length, seed=recipe.seed,
            progress=lambda done, of: report("writing text", done, of),
        )  # fmt: skip
        store(drafts, {"ids": ids.contiguous()})
    ids, weights = choose(
        model, recipe, pool, ids, held_out=held_out,
        progress=lambda done, of: report("choosing text", done, of),
    )  # fmt: skip
    weighted = {} if weights is None else {"weights": weights.contiguous()}
    store(path, {"ids": ids.contiguous(), **weighted})
    return ids, weights


def choose(
    model: StreamedModel,
    recipe: Recipe,
    pool: Pool,
    ids: Tensor,
    *,
    held_out: int,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Of ids [n, T], those to use, the first `held_out` to measure on, and weights (None: alike).

    What matches a target chooses the text to measure on as well; any other choice leaves that a
    random sample of the candidates.
    """
    settings, seed = recipe.calibration, recipe.seed
    wanted = settings.sequences + recipe.search.sequences
    if settings.select == "random":
        if pool.ids is None:
            return ids, None  # as many as are wanted were written
        return choose_windows(ids, wanted, seed=seed), None
    info = find(settings.select)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    if pool.target is not None and {"target", "target_ids"} & set(info.needs):
        held_out = 0
    first = min(held_out, len(ids) // 3)
    held, rest = order[:first], order[first:]
    candidates = _describe(model, recipe, pool, ids, rest, info.needs, progress)
    found: Selection = info.function(candidates, min(wanted - len(held), len(rest)), seed=seed)
    # The first are measured on: none is to be better matched than the others.
    count = len(found.indices)
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    indices, weights = found.indices[shuffled], found.weights[shuffled]
    chosen = ids[torch.cat([held, rest[indices]])]
    if bool((weights == weights[0]).all()):
        return chosen, None
    return chosen, torch.cat([torch.ones(len(held)), weights])


def _describe(
    model: StreamedModel,
    recipe: Recipe,
    pool: Pool,
    ids: Tensor,
    rows: Tensor,
    needs: tuple[str, ...],
    progress: Progress | None,
) -> Candidates:
    """The rows of ids with what the method needs to know of them."""
    own = ids[rows]
    known: dict[str, Any] = {}
    if "texts" in needs or "target_ids" in needs:
        tokenizer = model.checkpoint.tokenizer()
        if "texts" in needs:
            known["texts"] = tuple(tokenizer.decode(row.tolist()) for row in own)
        if "target_ids" in needs and pool.target is not None:
            found = tokenizer(pool.target, add_special_tokens=False, verbose=False)["input_ids"]
            known["target_ids"] = torch.tensor(found, dtype=torch.long)
    if "states" in needs:
        known["states"] = mean_states(model, own)
    if "losses" in needs:
        known["losses"] = perturbed_losses(model, own, seed=recipe.seed, progress=progress)
    sources = None if pool.sources is None else pool.sources[rows]
    return Candidates(own, target=pool.target, sources=sources, **known)
