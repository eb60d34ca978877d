"""The governor: shrinks when it pays, grows when it has paid for a while, never sways."""

from __future__ import annotations

import random

from pliant.plan.joint import CacheCost, Demand, JointPlan
from pliant.serve.governor import Governor

BYTES = {16: 320, 8: 180, 4: 100}
FRONTIER = [(1000 * k, 1.0 / k) for k in range(20, 200)]
PLAN = JointPlan(FRONTIER, CacheCost(BYTES, {8: 0.0005, 4: 0.01}))
MEMORY = 220_000


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def governor(clock: Clock) -> Governor:
    return Governor(PLAN, calm=5.0, clock=clock)


def test_weights_go_down_at_once_when_requests_come():
    clock = Clock()
    one = governor(clock)
    assert one.order(MEMORY, Demand(0, 100), 180_000) is None
    order = one.order(MEMORY, Demand(900, 100), 180_000)
    assert order is not None
    assert order.weights == PLAN.split(MEMORY, Demand(900, 100)).weights < 180_000
    assert "1,000 tokens" in order.reason


def test_they_go_up_only_after_a_calm():
    clock = Clock()
    one = governor(clock)
    busy, idle = Demand(900, 100), Demand(0, 100)
    weights = one.order(MEMORY, busy, 180_000).weights
    for _ in range(49):
        clock.now += 0.1
        assert one.order(MEMORY, idle, weights) is None
    clock.now += 0.3
    order = one.order(MEMORY, idle, weights)
    assert order is not None
    assert order.weights > weights
    assert "for 5 s" in order.reason


def test_a_load_that_comes_and_goes_moves_weights_once():
    clock, weights, moves = Clock(), 180_000, 0
    one = governor(clock)
    for turn in range(600):
        clock.now += 0.1
        demand = Demand(900, 100) if turn // 20 % 2 else Demand(0, 100)
        order = one.order(MEMORY, demand, weights)
        if order is not None:
            weights, moves = order.weights, moves + 1
    assert moves <= 2


def test_what_is_ordered_fits_and_is_not_ordered_again():
    clock, chooser, weights, memory = Clock(), random.Random(0), 180_000, MEMORY
    one = governor(clock)
    for _ in range(2000):
        clock.now += chooser.random()
        if chooser.random() < 0.05:
            memory = chooser.randrange(60_000, 400_000)
        demand = Demand(chooser.randrange(1500), chooser.randrange(200))
        order = one.order(memory, demand, weights)
        if order is None:
            continue
        weights = order.weights
        if PLAN.split(memory, demand) is None:
            assert weights == PLAN.smallest
        else:
            assert PLAN.at(memory, demand, weights) is not None
        assert one.order(memory, demand, weights) is None


def test_small_gains_are_not_worth_a_move():
    one = governor(Clock())
    demand = Demand(0, 100)
    best = PLAN.split(MEMORY, demand).weights
    assert one.order(MEMORY, demand, best - 1000) is None  # 1/188 and 1/187: under 0.001


def test_sharing_may_add_so_much_damage():
    one = Governor(PLAN, share_damage=0.004, clock=Clock())
    alone = Demand(60, 40)
    assert one.admits(MEMORY, Demand(150, 80), alone)
    assert not one.admits(MEMORY, Demand(3000, 400), alone)
    assert not Governor(PLAN, 9.0).admits(MEMORY, Demand(10**7, 0), alone)
