"""How bench/methods.py makes the codes of a row: observe, build, and what some rows do beside."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from methods_rows import OWN_TEXT, RUNGS, Planned, Row
from observing import build_all, linear_observations
from pliant.codes import Code
from pliant.fit.calibrate import Pool, choose
from pliant.fit.evaluate import Evaluator
from pliant.fit.evolving import evolve_sizes
from pliant.fit.planning import Rungs, distinct, make_ladder, measure_samples
from pliant.fit.recipe import Calibration, Recipe, Search
from pliant.fit.reconstruct import reconstruct
from pliant.ladder import Rung
from pliant.ladder.shard import Extent
from pliant.methods import find
from pliant.model import StreamedModel
from pliant.observe import Observation, choose_windows, load_text, split, windows, write_text
from texts import KINDS, kind_windows

HELD_OUT = 2  # windows that plans are decided on


@dataclass(frozen=True)
class Built:
    """The codes of all linear layers; seconds: of making them, without the observing pass.

    accepted: of an evolved plan, whether held-out text took it.
    """

    codes: dict[str, Code]
    seconds: float
    accepted: bool | None = None


class Builder:
    """The model with what was observed of it for the rows that are to be made."""

    def __init__(
        self, model: StreamedModel, text: Path, sequences: int, candidates: Path, rows: list[Row]
    ) -> None:
        self._model, self._sequences, self._candidates = model, sequences, candidates
        calibration = split(load_text(text), "calibration")
        found = windows(calibration, model.checkpoint.tokenizer())
        chosen = choose_windows(found, sequences + HELD_OUT)
        self._ids, self._held_out = chosen[:sequences], chosen[sequences:]
        self._text, self._rows = text, rows
        self._seen: list[Observation] | None = None

    def build(self, row: Row) -> Built:
        """PliantError, or an error of torch, where the method does not work."""
        if row.select:
            return self._on_chosen_text(row)
        seen = self._observations()
        started = self._now()
        if row.planned is not None:
            codes, accepted = self._plan(row, row.planned, seen)
            return Built(codes, self._now() - started, accepted)
        codes = self._each(row, seen)
        if row.reconstruct is not None:
            codes = reconstruct(
                self._model, self._ids, codes, row.reconstruct.method, row.reconstruct.options,
                window=row.reconstruct.window,
            )  # fmt: skip
        return Built(codes, self._now() - started)

    def _each(self, row: Row, observations: Iterable[Observation]) -> dict[str, Code]:
        function = find(row.method).function

        def build(weight: Tensor, seen: Observation) -> Code:
            # Statistics of its own: what other rows keep with them is no saving of this one.
            code: Code = function(weight, replace(seen.statistics), **row.options)
            return code

        return build_all(self._model, observations, build)

    def _on_chosen_text(self, row: Row) -> Built:
        started = self._now()
        ids, weights = self._choice(row.select)
        chosen = self._now() - started
        seen = list(linear_observations(self._model, ids, row.needs, weights=weights))
        started = self._now()
        return Built(self._each(row, seen), chosen + self._now() - started)

    def _choice(self, select: str) -> tuple[Tensor, Tensor | None]:
        """Windows [sequences, T] of one way to choose, and their weights."""
        if select == OWN_TEXT:
            return write_text(self._model, self._sequences, self._ids.shape[1]), None
        pool = candidates(self._candidates, self._text, self._model.checkpoint.tokenizer)
        assert pool.ids is not None
        # `choose` adds what search would measure on; here that is one of the sequences.
        recipe = Recipe(
            calibration=Calibration(
                text=("several", "texts"), target="some", select=select,
                sequences=self._sequences - 1, candidates=len(pool.ids),
            ),
            search=Search(sequences=1),
        )  # fmt: skip
        return choose(self._model, recipe, pool, pool.ids, held_out=0)

    def _plan(
        self, row: Row, planned: Planned, observations: list[Observation]
    ) -> tuple[dict[str, Code], bool | None]:
        model, kept = self._model, _Kept()
        made = {seen.target.name: self._rungs(seen, kept) for seen in observations}
        size = sum(r.nbytes for own in made.values() for r in own if r.options == row.options)
        rungs: Rungs = distinct(made)
        targets = [t for t in model.targets if t.name in rungs]
        samples = measure_samples(
            kept, lambda: Evaluator(model, self._held_out), rungs, targets, planned.measured, seed=0
        )
        bits = (8 * size + 4) / sum(t.shape[0] * t.shape[1] for t in model.targets)
        search = Search(generations=planned.generations, evolve_bits=(bits,))
        evolve_sizes(kept, model, self._ids, self._held_out, rungs, samples, search, seed=0)
        ladder, _ = make_ladder(rungs, targets, samples, 0)
        allocation, accepted = ladder.allocation(size), None
        for entry in kept.state("evolved") or []:
            allocation = entry["allocation"]
            accepted = entry["used"] if "held_out" in entry else None  # it found nothing better
        return {t: kept.load_code(ladder.rungs[t][i]) for t, i in allocation.items()}, accepted

    def _rungs(self, seen: Observation, kept: _Kept) -> list[Rung]:
        weight, made = self._model.weight(seen.target), []
        for index, options in enumerate(RUNGS):
            code = find("gptq").function(weight, seen.statistics, **options)
            damage = seen.damage(code.decode() - weight)
            rung = Rung(seen.target.name, index, "gptq", options, {}, code.nbytes, damage, _NOWHERE)
            kept.codes[rung.target, index] = code
            made.append(rung)
        return made

    def _observations(self) -> list[Observation]:
        """The bench's windows', with all that the rows need; second moments always.

        Methods that run without the second moments weigh by them where they are known, so that
        a row's figures must not depend on which others run.
        """
        if self._seen is None:
            needs = {"second_moment"}.union(*(row.needs for row in self._rows if not row.select))
            self._seen = list(linear_observations(self._model, self._ids, frozenset(needs)))
        return self._seen

    def _now(self) -> float:
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)
        return time.monotonic()


_NOWHERE = Extent("", 0, 0, "", "", ())


@dataclass
class _Kept:
    """What planning asks of a ladder's writer, in memory."""

    codes: dict[tuple[str, int], Code] = field(default_factory=dict)
    states: dict[str, Any] = field(default_factory=dict)

    def load_code(self, rung: Rung) -> Code:
        return self.codes[rung.target, RUNGS.index(rung.options)]

    def state(self, name: str) -> Any:
        return self.states.get(name)

    def save_state(self, name: str, value: Any) -> None:
        self.states[name] = value


def candidates(path: Path, text: str | Path, tokenizer: Callable[[], Any]) -> Pool:
    """Windows of WikiText and as many of other kinds, and other WikiText as the target.

    Kept at `path`, so that a machine that cannot fetch the other kinds reads them there.
    """
    calibration = split(load_text(text), "calibration")
    half = len(calibration) // 2
    if not path.exists():
        parts = [kind_windows(kind, tokenizer()) for kind in sorted(KINDS)]
        own = windows(calibration[:half], tokenizer())
        parts.insert(0, choose_windows(own, sum(map(len, parts))))
        sources = torch.arange(len(parts)).repeat_interleave(
            torch.tensor([len(part) for part in parts])
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"ids": torch.cat(parts).int(), "sources": sources.int()}, path)
    found = load_file(path)
    return Pool(found["ids"].long(), found["sources"].long(), calibration[half:])
