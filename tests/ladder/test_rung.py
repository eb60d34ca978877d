"""Allocations: never above what was asked, nested along the climb, the same every time."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pliant.errors import BudgetError, CorruptError
from pliant.ladder import Ladder, Rung, Step
from pliant.ladder.shard import Extent


def rung(target: str, index: int, nbytes: int) -> Rung:
    return Rung(target, index, "m", {}, {}, nbytes, 0.0, Extent("s", 0, nbytes, "", "", ()))


@st.composite
def ladders(draw):
    sizes = draw(
        st.lists(
            st.lists(st.integers(1, 50), min_size=1, max_size=4, unique=True).map(sorted),
            min_size=1,
            max_size=5,
        )
    )
    rungs = {
        f"t{i}": tuple(rung(f"t{i}", j, n) for j, n in enumerate(s)) for i, s in enumerate(sizes)
    }
    moves = draw(st.permutations([f"t{i}" for i, s in enumerate(sizes) for _ in s[1:]]))
    at = dict.fromkeys(rungs, 0)
    climb = []
    for number, target in enumerate(moves):
        at[target] += 1
        climb.append(Step(target, at[target], 1.0 / (number + 1)))
    return Ladder(rungs, tuple(climb), draw(st.integers(0, 20)), 2.0)


@settings(max_examples=200, deadline=None)
@given(ladders(), st.integers(1, 400))
def test_bytes_never_exceed_the_request(ladder, asked):
    if asked < ladder.smallest_bytes:
        with pytest.raises(BudgetError, match=f"{ladder.smallest_bytes} bytes"):
            ladder.allocation(asked)
        return
    allocation = ladder.allocation(asked)
    assert ladder.bytes_of(allocation) <= asked
    assert allocation == ladder.allocation(asked)
    if asked >= ladder.largest_bytes:
        assert allocation == ladder.top()


@settings(max_examples=200, deadline=None)
@given(ladders(), st.integers(1, 400), st.integers(0, 100))
def test_the_prefix_that_fits_is_in_every_larger_allocation(ladder, asked, more):
    asked = max(asked, ladder.smallest_bytes)
    prefix = dict.fromkeys(ladder.rungs, 0)
    for step in ladder.climb:
        after = {**prefix, step.target: step.rung}
        if ladder.bytes_of(after) > asked:
            break
        prefix = after
    for size in (asked, asked + more):
        found = ladder.allocation(size)
        assert all(found[target] >= index for target, index in prefix.items())


@settings(max_examples=100, deadline=None)
@given(ladders(), st.integers(0, 300))
def test_nothing_that_still_fits_is_left_out(ladder, extra):
    asked = ladder.smallest_bytes + extra
    found = ladder.allocation(asked)
    size = ladder.bytes_of(found)
    for target, index in found.items():
        rungs = ladder.rungs[target]
        if index + 1 < len(rungs):
            assert size - rungs[index].nbytes + rungs[index + 1].nbytes > asked


def test_the_frontier_starts_at_the_smallest_and_ends_at_the_largest():
    ladder = Ladder(
        {"a": (rung("a", 0, 1), rung("a", 1, 3)), "b": (rung("b", 0, 2), rung("b", 1, 9))},
        (Step("b", 1, 0.5), Step("a", 1, 0.1)),
        10,
        0.9,
    )
    assert list(ladder.frontier()) == [(13, 0.9), (20, 0.5), (22, 0.1)]
    assert (ladder.smallest_bytes, ladder.largest_bytes) == (13, 22)
    assert ladder.allocation(19) == {"a": 1, "b": 0}


@pytest.mark.parametrize(
    ("rungs", "climb"),
    [
        ({"a": (rung("a", 0, 3), rung("a", 1, 3))}, ()),
        ({"a": ()}, ()),
        ({"a": (rung("a", 1, 3),)}, ()),
        ({"a": (rung("a", 0, 3),)}, (Step("a", 1, 0.0),)),
        ({"a": (rung("a", 0, 3), rung("a", 1, 4))}, (Step("b", 1, 0.0),)),
        ({"a": (rung("a", 0, 3), rung("a", 1, 4))}, (Step("a", 1, 0.0), Step("a", 1, 0.0))),
    ],
)
def test_a_ladder_that_is_none_is_refused(rungs, climb):
    with pytest.raises(CorruptError):
        Ladder(rungs, climb)
