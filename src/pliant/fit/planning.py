"""From rungs with predicted damage to a ladder: measure, correct, climb."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pliant.codes import Code
from pliant.fit.evaluate import Evaluator, code_lookup
from pliant.ladder import Ladder, Rung, Step, Writer
from pliant.model import Target
from pliant.plan.climb import Option, climb, hull
from pliant.plan.search import Correction, Sample, correct, draw, spaced

Progress = Callable[[int, int], None]
Rungs = Mapping[str, Sequence[Rung]]
_MEASURED_BITS = (2.4, 5.0)  # sizes between which models are measured, in bits of the 8-bit size


def features(targets: Sequence[Target]) -> dict[str, tuple[str, ...]]:
    """What a target's damage may have in common with others': its depth and its role."""
    return {
        t.name: (f"block {t.block}" if t.block is not None else "outer", f"role {t.role}")
        for t in targets
    }


def levels(rungs: Rungs) -> dict[str, list[str]]:
    """The bit width of each rung, as a factor's name."""
    return {
        target: [f"bits {r.options.get('bits', r.method)}" for r in own]
        for target, own in rungs.items()
    }


def distinct(rungs: Rungs) -> dict[str, list[Rung]]:
    """Rungs strictly rising in bytes: of two with the same bytes, the one with less damage."""
    kept: dict[str, list[Rung]] = {}
    for target, own in rungs.items():
        best: dict[int, Rung] = {}
        for rung in own:
            if rung.nbytes not in best or rung.damage < best[rung.nbytes].damage:
                best[rung.nbytes] = rung
        kept[target] = [best[size] for size in sorted(best)]
    return kept


def options_of(rungs: Rungs) -> dict[str, list[Option]]:
    return {t: [Option(r.nbytes, r.damage) for r in own] for t, own in rungs.items()}


def measure_samples(
    writer: Writer,
    evaluator: Callable[[], Evaluator],
    rungs: Rungs,
    targets: Sequence[Target],
    count: int,
    *,
    seed: int,
    name: str = "samples",
    progress: Progress | None = None,
) -> list[Sample]:
    """`count` whole models around the climb, measured; those of an interrupted run are kept.

    name: under which the writer keeps them.
    """
    done: list[dict[str, Any]] = list(writer.state(name) or [])
    options = options_of(rungs)
    if not count or all(len(own) == 1 for own in options.values()):
        return []
    low = sum(own[0].nbytes for own in options.values())
    high = sum(own[-1].nbytes for own in options.values())
    numbers = sum(t.shape[0] * t.shape[1] for t in targets)
    sizes = [min(max(int(b * numbers / 8), low), high) for b in _MEASURED_BITS]
    drawn = draw(options, features(targets), spaced(sizes[0], sizes[1], count), seed=seed)
    made = evaluator() if len(done) < count else None
    for index, allocation in enumerate(drawn[len(done) :], len(done)):
        if progress is not None:
            progress(index, count)
        assert made is not None
        damage = made.damage(
            code_lookup(allocation, lambda target, i: writer.load_code(rungs[target][i]))
        )
        done.append({"allocation": allocation, "damage": damage})
        writer.save_state(name, done)
    if progress is not None:
        progress(count, count)
    return [Sample(s["allocation"], s["damage"]) for s in done[:count]]


def correct_options(
    rungs: Rungs, targets: Sequence[Target], samples: Sequence[Sample]
) -> tuple[dict[str, list[Option]], Correction]:
    """Every rung's bytes and damage, corrected by what was measured."""
    options, shared, level = options_of(rungs), features(targets), levels(rungs)
    correction = correct(options, shared, level, samples)
    return correction.apply(options, shared, level), correction


def make_ladder(
    rungs: Rungs,
    targets: Sequence[Target],
    samples: Sequence[Sample],
    fixed_bytes: int,
    through: Sequence[Mapping[str, int]] = (),
) -> tuple[Ladder, Correction]:
    """The climb over corrected damages; rungs that it never uses are left out.

    through: allocations that it passes (`evolve_sizes`), in the numbering of `rungs`.
    """
    corrected, correction = correct_options(rungs, targets, samples)
    kept = {target: hull(own) for target, own in corrected.items()}
    renumber = {t: {old: new for new, old in enumerate(own)} for t, own in kept.items()}
    chosen = {
        target: tuple(
            dataclasses.replace(rungs[target][old], index=new, damage=corrected[target][old].damage)
            for new, old in enumerate(own)
        )
        for target, own in kept.items()
    }
    total = sum(corrected[t][own[0]].damage for t, own in kept.items())
    start = correction.total(total)
    steps = []
    for move in climb(corrected, through):
        total -= move.saved
        steps.append(
            Step(move.target, renumber[move.target][move.stop], correction.total(max(total, 0.0)))
        )
    return Ladder(chosen, tuple(steps), fixed_bytes, start), correction


def better_ladder(
    writer: Writer,
    evaluator: Callable[[], Evaluator],
    ladders: Sequence[Ladder],
    sizes: Sequence[int],
    *,
    name: str,
    progress: Progress | None = None,
) -> Ladder:
    """The ladder of the least damage, measured at `sizes` (bytes of weights): the mean logarithm.

    name: under which the writer keeps what was measured. The first of equals wins.
    """

    def reader(ladder: Ladder) -> Callable[[str, int], Code]:
        return lambda target, index: writer.load_code(ladder.rungs[target][index])

    done: list[float] = list(writer.state(name) or [])
    count = len(ladders) * len(sizes)
    made = evaluator() if len(done) < count else None
    for index in range(len(done), count):
        ladder, size = ladders[index // len(sizes)], sizes[index % len(sizes)]
        assert made is not None
        done.append(made.damage(code_lookup(ladder.allocation(size), reader(ladder))))
        writer.save_state(name, done)
        if progress is not None:
            progress(index + 1, count)
    scores = [
        sum(math.log(max(damage, 1e-9)) for damage in done[start : start + len(sizes)])
        for start in range(0, count, len(sizes))
    ]
    return ladders[scores.index(min(scores))]
