"""The climb against exhaustive search: every prefix is the best choice for its bytes."""

from __future__ import annotations

import random
from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pliant.plan.climb import Option, climb, hull, prefix

Toy = dict[str, list[Option]]


def toy(seed: int, convex: bool, targets: int = 6, options: int = 4) -> Toy:
    """Up to `targets` targets with up to `options` options, bytes rising and damage falling."""
    chooser = random.Random(seed)
    made: Toy = {}
    for index in range(chooser.randint(1, targets)):
        count = chooser.randint(1, options)
        steps = [chooser.randint(1, 20) for _ in range(count - 1)]
        slopes = [chooser.expovariate(1) for _ in steps]
        if convex:
            slopes.sort(reverse=True)
        saved = [step * slope for step, slope in zip(steps, slopes, strict=True)]
        nbytes, damage = chooser.randint(1, 20), sum(saved) + chooser.random()
        own = [Option(nbytes, damage)]
        for step, less in zip(steps, saved, strict=True):
            nbytes, damage = nbytes + step, damage - less
            own.append(Option(nbytes, damage))
        made[f"t{index}"] = own
    return made


def totals(options: Toy, allocation: dict[str, int]) -> tuple[int, float]:
    chosen = [options[target][index] for target, index in allocation.items()]
    return sum(o.nbytes for o in chosen), sum(o.damage for o in chosen)


def exhaustive(options: Toy) -> list[tuple[int, float]]:
    """(bytes, damage) of every allocation."""
    found = product(*options.values())
    return [(sum(o.nbytes for o in c), sum(o.damage for o in c)) for c in found]


def walk(options: Toy) -> list[dict[str, int]]:
    """The allocation after each prefix of the climb."""
    at = {target: hull(own)[0] for target, own in options.items()}
    seen = [dict(at)]
    for move in climb(options):
        assert at[move.target] == move.start < move.stop
        at[move.target] = move.stop
        seen.append(dict(at))
    return seen


@pytest.mark.parametrize("seed", range(25))
def test_every_prefix_is_the_best_for_its_bytes(seed: int) -> None:
    """With convex options; also without, since the hull leaves the others out."""
    for convex in (True, False):
        options = toy(seed, convex)
        everything = exhaustive(options)
        for allocation in walk(options):
            size, damage = totals(options, allocation)
            best = min(d for b, d in everything if b <= size)
            assert damage == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("seed", range(25))
def test_between_prefixes_the_gap_is_at_most_one_move(seed: int) -> None:
    options = toy(seed, convex=False)
    everything, moves = exhaustive(options), climb(options)
    largest = max((move.saved for move in moves), default=0.0)
    low, high = everything[0][0], max(b for b, _ in everything)
    low = sum(own[0].nbytes for own in options.values())
    for budget in range(low, high + 1):
        size, damage = totals(options, prefix(options, budget))
        assert size <= budget
        best = min(d for b, d in everything if b <= budget)
        assert best - 1e-9 <= damage <= best + largest + 1e-9


@pytest.mark.parametrize("convex", [True, False])
def test_prefixes_are_nested_and_damage_falls(convex: bool) -> None:
    options = toy(7, convex)
    steps = walk(options)
    for low, high in pairwise(steps):
        assert all(low[target] <= high[target] for target in options)
        assert totals(options, low)[0] < totals(options, high)[0]
        assert totals(options, low)[1] > totals(options, high)[1]
    slopes = [move.slope for move in climb(options)]
    assert slopes == sorted(slopes, reverse=True)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 400))
def test_a_prefix_never_passes_its_budget(seed: int, budget: int) -> None:
    options = toy(seed, convex=False)
    smallest = sum(own[0].nbytes for own in options.values())
    size, damage = totals(options, prefix(options, budget))
    assert size <= max(budget, smallest)
    more = totals(options, prefix(options, budget + 1))
    assert more[1] <= damage + 1e-9 or more[0] > size, "more bytes are put to some use"


def test_prefix_takes_the_climb_at_its_own_sizes() -> None:
    options = toy(3, convex=True)
    for allocation in walk(options):
        assert prefix(options, totals(options, allocation)[0]) == allocation


def test_hull_leaves_out_what_is_never_the_best_use_of_a_byte() -> None:
    options = [Option(10, 8), Option(20, 7), Option(30, 1), Option(40, 2), Option(50, 0.5)]
    assert hull(options) == [0, 2, 4]
    assert hull(options[:1]) == [0]
    assert hull([Option(1, 1), Option(2, 1), Option(3, 5)]) == [0], "more bytes for no gain"
    line = [Option(1, 3), Option(2, 2), Option(3, 1)]
    assert hull(line) in ([0, 2], [0, 1, 2])


def test_order_of_targets_does_not_matter() -> None:
    options = toy(11, convex=True)
    backwards = dict(reversed(options.items()))
    assert climb(options) == climb(backwards)
    same = {name: [Option(1, 1.0), Option(2, 0.5)] for name in "cab"}
    assert [move.target for move in climb(same)] == ["a", "b", "c"]


def test_nothing_to_climb() -> None:
    assert climb({}) == []
    assert climb({"a": [Option(5, 1.0)]}) == []
    assert prefix({"a": [Option(5, 1.0)]}, 0) == {"a": 0}
