"""One budget for weights and cache: never worse than a fixed cache, and exact at its corners."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pliant.errors import PliantError
from pliant.plan.joint import CacheCost, Demand, JointPlan

BYTES = {16: 320, 8: 180, 4: 100, 3: 80, 2: 60}
DAMAGES = {8: 0.0001, 4: 0.004, 3: 0.02, 2: 0.12}
FRONTIER = [(10_000, 1.0), (20_000, 0.4), (40_000, 0.1), (80_000, 0.01), (90_000, 0.012)]

plan = JointPlan(FRONTIER, CacheCost(BYTES, DAMAGES))
demands = st.builds(Demand, st.integers(0, 2000), st.integers(0, 300))
budgets = st.integers(0, 1_000_000)


@given(budgets, demands)
def test_no_fixed_cache_is_better_and_both_parts_fit(memory, demand):
    split = plan.split(memory, demand)
    if split is None:
        assert memory < plan.smallest + plan.cost.nbytes(demand)
        assert plan.fixed(memory, demand, 2) is None
        return
    assert split.weights + split.cache <= memory
    assert split.cache >= plan.cost.nbytes(demand, None)
    for bits in BYTES:
        fixed = plan.fixed(memory, demand, bits)
        assert fixed is None or split.damage <= fixed.damage + 1e-12


@given(budgets, demands, st.integers(1, 100_000))
def test_more_memory_never_damages_more(memory, demand, more):
    split, larger = plan.split(memory, demand), plan.split(memory + more, demand)
    assert split is None or larger.damage <= split.damage + 1e-12


def test_what_fits_in_full_is_not_coded():
    split = plan.split(80_000 + 500 * 320, Demand(400, 100))
    assert (split.weights, split.cache_damage, split.bits) == (80_000, 0.0, 16)


def test_a_mix_of_two_widths_lies_on_the_line_between_them():
    cost, demand = CacheCost(BYTES, DAMAGES), Demand(1000, 0)
    between = (cost.nbytes(demand, 8) + cost.nbytes(demand, 4)) // 2
    found = cost.damage(demand, np.array([between]))[0]
    assert found == pytest.approx((DAMAGES[8] + DAMAGES[4]) / 2)
    assert cost.width(demand, between) == 4
    assert math.isinf(cost.damage(demand, np.array([cost.nbytes(demand) - 1]))[0])


def test_widths_that_a_mix_beats_are_left_out():
    cost = CacheCost(BYTES, {8: 0.05, 4: 0.01, 2: 0.1})
    assert cost.widths == (16, 4, 2)
    assert CacheCost(BYTES, {}).widths == (16,)


def test_hot_tokens_are_paid_in_full():
    cost = CacheCost(BYTES, DAMAGES)
    assert cost.nbytes(Demand(10, 7), 4) == 10 * 100 + 7 * 320


def test_a_plan_needs_sizes():
    with pytest.raises(PliantError, match="at least one size"):
        JointPlan([], CacheCost(BYTES, DAMAGES))
