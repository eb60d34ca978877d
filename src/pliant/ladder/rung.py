"""Rungs, the climb over them, and the choice of one rung a target for a number of bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from pliant.budget import format_size
from pliant.errors import BudgetError, CorruptError
from pliant.ladder.shard import Extent

Allocation = dict[str, int]


@dataclass(frozen=True, slots=True)
class Rung:
    """One stored code of one target.

    index: place in the target's rungs, 0 is the smallest.
    nbytes: bytes of the code's tensors. damage: nats a token that it adds, as planned.
    where: the bytes on disk.
    """

    target: str
    index: int
    method: str
    options: dict[str, Any]
    meta: dict[str, Any]
    nbytes: int
    damage: float
    where: Extent


@dataclass(frozen=True, slots=True)
class Step:
    """One move of the climb: `target` goes up to `rung`; `damage` is the whole model's after it."""

    target: str
    rung: int
    damage: float


@dataclass(frozen=True)
class Ladder:
    """Every rung of every target, and the order in which a growing model takes them.

    rungs: by target, bytes strictly rising. climb: starts with every target on rung 0.
    fixed_bytes: tensors that every size holds. start_damage: the whole model's before the climb.
    """

    rungs: Mapping[str, tuple[Rung, ...]]
    climb: tuple[Step, ...]
    fixed_bytes: int = 0
    start_damage: float = 0.0

    def __post_init__(self) -> None:
        for target, rungs in self.rungs.items():
            sizes = [rung.nbytes for rung in rungs]
            if not sizes or any(a >= b for a, b in pairwise(sizes)):
                raise CorruptError(f"the rungs of {target} must rise in bytes, they are {sizes}")
            if [rung.index for rung in rungs] != list(range(len(rungs))):
                raise CorruptError(f"the rungs of {target} are not numbered from 0")
        at = dict.fromkeys(self.rungs, 0)
        for step in self.climb:
            if step.target not in at:
                raise CorruptError(f"the climb names {step.target}, which has no rungs")
            if not at[step.target] < step.rung < len(self.rungs[step.target]):
                raise CorruptError(
                    f"the climb moves {step.target} from rung {at[step.target]} to {step.rung}"
                )
            at[step.target] = step.rung

    @property
    def smallest_bytes(self) -> int:
        return self.bytes_of(dict.fromkeys(self.rungs, 0))

    @property
    def largest_bytes(self) -> int:
        """Bytes at the end of the climb."""
        return self.bytes_of(self.top())

    def top(self) -> Allocation:
        """The allocation at the end of the climb."""
        allocation = dict.fromkeys(self.rungs, 0)
        for step in self.climb:
            allocation[step.target] = step.rung
        return allocation

    def bytes_of(self, allocation: Mapping[str, int]) -> int:
        """Weight bytes of `allocation`, fixed tensors included."""
        return self.fixed_bytes + sum(
            self.rungs[target][index].nbytes for target, index in allocation.items()
        )

    def frontier(self) -> Iterator[tuple[int, float]]:
        """(bytes, damage) of the smallest size and after each step of the climb."""
        size, at = self.smallest_bytes, dict.fromkeys(self.rungs, 0)
        yield size, self.start_damage
        for step in self.climb:
            rungs = self.rungs[step.target]
            size += rungs[step.rung].nbytes - rungs[at[step.target]].nbytes
            at[step.target] = step.rung
            yield size, step.damage

    def damage_at(self, weight_bytes: int) -> float:
        """Predicted damage of the longest prefix of the climb in `weight_bytes`."""
        return min((damage for size, damage in self.frontier() if size <= weight_bytes),
                   default=self.start_damage)  # fmt: skip

    def allocation(self, weight_bytes: int) -> Allocation:
        """The rung of every target when all weights together may take `weight_bytes`.

        The longest prefix of the climb that fits, then every later step, in order, that still
        fits and whose target has taken all its earlier steps. Raises BudgetError when even the
        smallest size is too large.
        """
        left = weight_bytes - self.smallest_bytes
        if left < 0:
            raise BudgetError(
                f"{format_size(weight_bytes)} for weights is below the smallest size, "
                f"{format_size(self.smallest_bytes)} ({self.smallest_bytes} bytes); "
                "ask for at least that many bytes, or fit again with smaller rungs"
            )
        allocation = dict.fromkeys(self.rungs, 0)
        held_back: set[str] = set()
        for step in self.climb:
            if step.target in held_back:
                continue
            rungs = self.rungs[step.target]
            cost = rungs[step.rung].nbytes - rungs[allocation[step.target]].nbytes
            if cost <= left:
                left -= cost
                allocation[step.target] = step.rung
            else:
                held_back.add(step.target)
        return allocation
