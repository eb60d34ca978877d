"""Allocations evolved at a few sizes, through which the climb then passes.

Damage of whole models on the calibration text selects; text held out decides. An allocation that
does not also beat the climb's on held-out text is dropped, because evolution fits the few windows
that it is scored on (EXPERIMENTS.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from pliant.codes import Code
from pliant.fit.evaluate import Evaluator, code_lookup
from pliant.fit.planning import Rungs, correct_options
from pliant.fit.recipe import Search
from pliant.ladder import Writer
from pliant.model import StreamedModel, Target
from pliant.plan.climb import Option, hull, prefix
from pliant.plan.evolve import Stage, evolve
from pliant.plan.scored import OutputsHash, Scored
from pliant.plan.search import Sample

Progress = Callable[[int, int], None]
Allocation = dict[str, int]
_SHARES = ((8, 4), (2, 2), (1, 1))  # of each stage: one sequence in so many, survivors


def evolve_sizes(
    writer: Writer,
    model: StreamedModel,
    ids: Tensor,
    held_out: Tensor,
    rungs: Rungs,
    samples: Sequence[Sample],
    settings: Search,
    *,
    seed: int,
    progress: Progress | None = None,
) -> list[Allocation]:
    """Allocations that `make_ladder` can pass through, each at or above the one before.

    ids [n, T] select, held_out [m, T] decides. For each size of `settings.evolve_bits`, small to
    large, the start is the climb's allocation through those found so far; sizes that are finished
    are kept for a run that goes on later.
    """
    if not settings.generations or not len(ids) or not len(held_out):
        return []
    targets = model.targets
    corrected, _ = correct_options(rungs, targets, samples)
    kept = {target: hull(own) for target, own in corrected.items()}
    options = {t: [corrected[t][i] for i in own] for t, own in kept.items()}
    numbers = sum(t.shape[0] * t.shape[1] for t in targets)
    low = sum(own[0].nbytes for own in options.values())
    high = sum(own[-1].nbytes for own in options.values())
    sizes = [int(bits * numbers / 8) for bits in sorted(settings.evolve_bits)]
    sizes = [size for size in sizes if low < size < high]
    if not sizes:
        return []

    def lookup(allocation: Mapping[str, int]) -> Callable[[Target], Code | None]:
        return code_lookup(allocation, lambda t, i: writer.load_code(rungs[t][kept[t][i]]))

    done: list[dict[str, Any]] = list(writer.state("evolved") or [])
    through: list[Allocation] = [entry["allocation"] for entry in done if entry["used"]]
    if len(done) < len(sizes):
        selecting, deciding = _Scorer(model, ids, lookup), Evaluator(model, held_out)
    for index in range(len(done), len(sizes)):
        entry = _evolve(
            options, sizes[index], through, selecting, lambda a: deciding.damage(lookup(a)),
            settings, seed + index,
            progress=_part(progress, index, len(sizes), settings.generations),
        )  # fmt: skip
        done.append(entry)
        if entry["used"]:
            through.append(entry["allocation"])
        writer.save_state("evolved", done)
    return [{t: kept[t][i] for t, i in allocation.items()} for allocation in through]


def evolved_summary(writer: Writer) -> list[dict[str, Any]]:
    """What each size's evolution found, without the allocations."""
    done: list[dict[str, Any]] = list(writer.state("evolved") or [])
    return [{k: v for k, v in entry.items() if k != "allocation"} for entry in done]


def _evolve(
    options: Mapping[str, Sequence[Option]],
    size: int,
    through: list[Allocation],
    selecting: _Scorer,
    decide: Callable[[Mapping[str, int]], float],
    settings: Search,
    seed: int,
    *,
    progress: Progress | None,
) -> dict[str, Any]:
    """The state of one size: what was found, its damages, and whether the climb is to use it."""
    start = prefix(options, size, through)
    scored = Scored(selecting.score, selecting.fingerprint)
    found = evolve(
        options, start, size, scored, generations=settings.generations,
        stages=selecting.stages(), offspring=settings.offspring,
        floor=through[-1] if through else None, seed=seed, progress=progress,
    )  # fmt: skip
    entry = {
        "nbytes": size, "allocation": found.allocation, "selected": found.damage,
        "selected_before": found.start_damage, "evaluations": scored.evaluations,
        "known": scored.known, "merged": scored.merged, "used": False,
    }  # fmt: skip
    if found.allocation == start:
        return entry
    before, after = decide(start), decide(found.allocation)
    return entry | {"held_out": after, "held_out_before": before, "used": after < before}


class _Scorer:
    """Damage of allocations on the first sequences of ids [n, T], and what tells functions apart.

    A fingerprint is the outputs on the first stage's sequences, and the rungs of targets that these
    never reach (experts that were not chosen, embeddings, which are looked up): of them the outputs
    say nothing.
    """

    def __init__(
        self,
        model: StreamedModel,
        ids: Tensor,
        lookup: Callable[[Mapping[str, int]], Callable[[Target], Code | None]],
    ) -> None:
        self._evaluator = Evaluator(model, ids)
        self._lookup = lookup
        self._sequences, self._length = ids.shape
        self._probe = max(1, self._sequences // _SHARES[0][0])
        self._unreached = sorted(_unreached(model, ids[: self._probe]))
        self._last: tuple[dict[str, int], float] | None = None

    def stages(self) -> list[Stage]:
        counts = [(max(1, self._sequences // part), left) for part, left in _SHARES]
        return [Stage(count * self._length, left) for count, left in counts]

    def score(self, allocation: Mapping[str, int], tokens: int) -> float:
        """Nats a token on the first `tokens` tokens."""
        sequences = tokens // self._length
        if sequences == self._probe and self._last and self._last[0] == allocation:
            return self._last[1]  # the fingerprint was taken on the same sequences
        return self._evaluator.damage(self._lookup(allocation), sequences)

    def fingerprint(self, allocation: Mapping[str, int]) -> str:
        outputs = OutputsHash()
        damage = self._evaluator.damage(self._lookup(allocation), self._probe, outputs.add)
        self._last = dict(allocation), damage
        rest = " ".join(str(allocation.get(name)) for name in self._unreached)
        return f"{outputs.hexdigest()} {rest}"


def _unreached(model: StreamedModel, ids: Tensor) -> set[str]:
    """Names of the targets by which no token of ids [n, T] is multiplied."""
    names = {target.name for target in model.targets}

    def reached(target: Target, x: Tensor, y: Tensor) -> None:
        if len(x):
            names.discard(target.name)

    with model.linear_calls(reached):
        hidden = model.capture(ids)
        model.tail(hidden[:1])
    return names


def _part(progress: Progress | None, index: int, count: int, each: int) -> Progress | None:
    """Progress of one of `count` evolutions as part of all."""
    if progress is None:
        return None
    return lambda done, _: progress(index * each + done, count * each)
