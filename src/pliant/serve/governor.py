"""Who gets the memory: weights or pages, decided from what runs and what waits.

The governor has no hands. It is told the budget and the demand, and says which size the weights
should have and why; the plan behind it (pliant.plan.joint) finds the split with the least damage.
Pages follow by themselves: they may take what the weights leave.

Weights go down as soon as it pays, so that a request need not wait. They go up when it would have
paid for all that was wanted in the last `calm` seconds, and each way only for a gain that is worth
moving for: so a load that comes and goes does not move them to and fro.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from pliant.budget import format_size
from pliant.plan.joint import Demand, JointPlan, Split

CALM_SECONDS = 5.0
LEAST_GAIN = 0.001
"""Nats a token that a move must save, or GAIN_SHARE of the damage, whichever is more."""
GAIN_SHARE = 0.05


@dataclass(frozen=True)
class Order:
    """Bring the weights to so many bytes, for this reason."""

    weights: int
    reason: str


class Governor:
    """Decides by `plan`. share_damage: nats a token that running more at once may add.

    calm, clock: seconds.
    """

    def __init__(
        self,
        plan: JointPlan,
        share_damage: float = 0.05,
        calm: float = CALM_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.plan, self.share_damage, self.calm = plan, share_damage, calm
        self._clock = clock
        self._seen: deque[tuple[float, Demand]] = deque()

    def order(self, memory: int, demand: Demand, weights: int) -> Order | None:
        """What to do when weights of so many bytes and `demand` share `memory` bytes; None: stay.

        Call it now and then; it remembers what was wanted.
        """
        peak = self._peak(demand)
        best = self.plan.split(memory, demand)
        now = self.plan.at(memory, demand, weights)
        tokens = f"{demand.cold + demand.hot:,} tokens"
        if best is None:
            if weights <= self.plan.smallest:
                return None
            return Order(self.plan.smallest, f"{tokens} leave no more in {format_size(memory)}")
        if now is None:
            return Order(best.weights, f"{tokens} do not fit beside the weights")
        if best.weights < weights and _pays(now, best):
            return Order(best.weights, f"{tokens} are wanted; {_words(now, best)}")
        later, stay = self.plan.split(memory, peak), self.plan.at(memory, peak, weights)
        if later is None or later.weights <= weights:
            return None
        if stay is not None and not _pays(stay, later):
            return None
        most = f"no more than {peak.cold + peak.hot:,} tokens were wanted for {self.calm:g} s"
        return Order(later.weights, f"{most}; {_words(stay, later)}")

    def admits(self, memory: int, demand: Demand, alone: Demand) -> bool:
        """Whether `demand`, with one request more, may run beside what `alone` would do by itself.

        alone: of one request, which must run in any case.
        """
        split, least = self.plan.split(memory, demand), self.plan.split(memory, alone)
        if split is None:
            return False
        return least is None or split.damage <= least.damage + self.share_damage

    def _peak(self, demand: Demand) -> Demand:
        """The most of each kind of tokens that was wanted lately."""
        now = self._clock()
        self._seen.append((now, demand))
        while self._seen[0][0] < now - self.calm:
            self._seen.popleft()
        return Demand(
            max(seen.cold for _, seen in self._seen), max(seen.hot for _, seen in self._seen)
        )


def _pays(before: Split, after: Split) -> bool:
    return before.damage - after.damage > max(LEAST_GAIN, GAIN_SHARE * before.damage)


def _words(before: Split | None, after: Split) -> str:
    if before is None:
        return f"{after.damage:.3f} nats a token expected"
    return f"{after.damage:.3f} nats a token expected instead of {before.damage:.3f}"
