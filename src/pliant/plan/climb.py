"""The climb: in which order the tensors of a growing model go up their rungs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Option:
    """One rung as the planner sees it: its bytes and the damage that it alone is thought to do."""

    nbytes: int
    damage: float


@dataclass(frozen=True)
class Move:
    """`target` goes from option `start` to option `stop` of its list."""

    target: str
    start: int
    stop: int
    nbytes: int
    saved: float

    @property
    def slope(self) -> float:
        """Damage saved for each byte."""
        return self.saved / self.nbytes


def hull(options: Sequence[Option]) -> list[int]:
    """Indices of the options on the lower convex hull of damage over bytes, smallest first.

    Options rise strictly in bytes. The others are never the best use of a byte: a mix of their
    neighbours on the hull saves more damage for the same bytes.
    """
    kept: list[int] = []
    for index, option in enumerate(options):
        if kept and option.damage >= options[kept[-1]].damage:
            continue
        while len(kept) >= 2 and _slope(options, kept[-2], kept[-1]) <= _slope(
            options, kept[-1], index
        ):
            kept.pop()
        kept.append(index)
    return kept


def _slope(options: Sequence[Option], start: int, stop: int) -> float:
    return (options[start].damage - options[stop].damage) / (
        options[stop].nbytes - options[start].nbytes
    )


def climb(
    options: Mapping[str, Sequence[Option]], through: Sequence[Mapping[str, int]] = ()
) -> list[Move]:
    """Every move along every target's hull, the best use of a byte first.

    For a damage that is a sum over targets, each prefix is the best choice for its bytes: moves
    are taken in falling order of damage saved a byte, and a hull's slopes fall, so a target's
    moves stay in order. Ties are broken by the target's name.

    through: allocations that the climb must pass, each at or above the one before it in every
    target and on the targets' hulls. Between two of them the order is the same.
    """
    moves = []
    for target, choices in options.items():
        steps = hull(choices)
        for start, stop in pairwise(steps):
            low, high = choices[start], choices[stop]
            moves.append(
                Move(target, start, stop, high.nbytes - low.nbytes, low.damage - high.damage)
            )

    def section(move: Move) -> int:
        """How many of the allocations come before the move."""
        return next((k for k, at in enumerate(through) if move.stop <= at[move.target]), count)

    count = len(through)
    return sorted(moves, key=lambda move: (section(move), -move.slope, move.target, move.stop))


def prefix(
    options: Mapping[str, Sequence[Option]],
    nbytes: int,
    through: Sequence[Mapping[str, int]] = (),
) -> dict[str, int]:
    """Each target's option when all together may take `nbytes`: the climb's prefix, then filled.

    With less than the smallest size, everyone's smallest.
    """
    allocation = {target: hull(choices)[0] for target, choices in options.items()}
    left = nbytes - sum(options[t][i].nbytes for t, i in allocation.items())
    held: set[str] = set()
    for move in climb(options, through):
        if move.target in held:
            continue
        if move.nbytes <= left:
            left -= move.nbytes
            allocation[move.target] = move.stop
        else:
            held.add(move.target)
    return allocation
