"""One budget for weights and KV cache together: the split with the least predicted damage.

Weights have the damage of the climb's prefix that fits them. Pages of the cache are kept in 16 bits
or in codes of fewer, at a measured damage each; a share of them at one width and the rest at the
next lie on a line between the two, so that the cache has a damage at every number of bytes. Both
are summed, which holds as well as damages of different layers add up (bench/joint.py measures it).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pliant.errors import PliantError


@dataclass(frozen=True)
class Demand:
    """Tokens whose keys and values are wanted at once: `cold` may be coded, `hot` stay as they are.

    Beginnings that sequences share count once.
    """

    cold: int
    hot: int


@dataclass(frozen=True)
class Split:
    """Bytes for weights, bytes for KV pages, and the damage of each, nats a token.

    bits: the narrowest width that pages come to.
    """

    weights: int
    cache: int
    weight_damage: float
    cache_damage: float
    bits: int

    @property
    def damage(self) -> float:
        return self.weight_damage + self.cache_damage


class CacheCost:
    """Bytes and damage of pages: a token's bytes by width, the widest not coded and harmless.

    damages: nats a token of a cache that is all in a width; widths that are missing are not used.
    """

    def __init__(self, token_bytes: Mapping[int, int], damages: Mapping[int, float]) -> None:
        self.full = max(token_bytes)
        points = [(token_bytes[self.full], 0.0, self.full)]
        for bits in sorted(damages, reverse=True):
            if bits not in token_bytes or bits == self.full:
                continue
            point = (token_bytes[bits], max(damages[bits], points[-1][1]), bits)
            while len(points) > 1 and _slope(points[-2], points[-1]) >= _slope(points[-1], point):
                points.pop()  # a mix of its neighbours does less
            points.append(point)
        self.full_bytes = points[0][0]
        self.widths = tuple(bits for _, _, bits in points)
        """Widths worth using, from the widest down."""
        self._bytes = np.array([size for size, _, _ in reversed(points)], float)
        self._damages = np.array([damage for _, damage, _ in reversed(points)])

    @property
    def least_bytes(self) -> int:
        """Of a token in the narrowest width."""
        return int(self._bytes[0])

    def nbytes(self, demand: Demand, bits: int | None = None) -> int:
        """Bytes of `demand` with all that may be coded in `bits`, the narrowest if None."""
        each = self.least_bytes if bits is None else self._of(bits)
        return demand.hot * self.full_bytes + demand.cold * each

    def damage(self, demand: Demand, nbytes: np.ndarray) -> np.ndarray:
        """Nats a token when `demand` is kept in so many bytes; infinite where it cannot be."""
        if not demand.cold:
            return np.where(nbytes < self.nbytes(demand), np.inf, 0.0)
        each = (nbytes - demand.hot * self.full_bytes) / demand.cold
        share = demand.cold / (demand.cold + demand.hot)
        found: np.ndarray = share * np.interp(each, self._bytes, self._damages, left=np.inf)
        return found

    def width(self, demand: Demand, nbytes: int) -> int:
        """The narrowest width that pages come to in so many bytes."""
        if not demand.cold:
            return self.full
        each = (nbytes - demand.hot * self.full_bytes) / demand.cold
        return next((bits for bits in self.widths if self._of(bits) <= each), self.widths[-1])

    def _of(self, bits: int) -> int:
        return int(self._bytes[len(self.widths) - 1 - self.widths.index(bits)])


class JointPlan:
    """What weights and cache together can be, for any budget and demand.

    frontier: (bytes, damage) of the weights along the climb, rising in bytes.
    """

    def __init__(self, frontier: Iterable[tuple[int, float]], cost: CacheCost) -> None:
        points = list(frontier)
        if not points:
            raise PliantError("a plan needs at least one size of the weights")
        self.cost = cost
        self._sizes = np.array([size for size, _ in points])
        self._damages = np.minimum.accumulate([damage for _, damage in points])

    @property
    def smallest(self) -> int:
        return int(self._sizes[0])

    @property
    def largest(self) -> int:
        """The weights' bytes with the least damage."""
        return int(self._sizes[int(self._damages.argmin())])

    def weight_damage(self, nbytes: int) -> float:
        """Of the longest prefix of the climb in so many bytes."""
        index = int(np.searchsorted(self._sizes, nbytes, "right")) - 1
        return float(self._damages[max(index, 0)])

    def split(self, memory: int, demand: Demand) -> Split | None:
        """The best way to part `memory` bytes; None where even the narrowest of all do not fit."""
        rest = memory - self._sizes
        damages = self._damages + self.cost.damage(demand, rest)
        best = int(damages.argmin())
        if not np.isfinite(damages[best]):
            return None
        return self.at(memory, demand, int(self._sizes[best]))

    def at(self, memory: int, demand: Demand, weights: int) -> Split | None:
        """The split where the weights take so many bytes; None where the cache does not fit."""
        rest = memory - weights
        damage = float(self.cost.damage(demand, np.array([rest]))[0])
        if not np.isfinite(damage):
            return None
        width = self.cost.width(demand, rest)
        return Split(weights, rest, self.weight_damage(weights), damage, width)

    def fixed(self, memory: int, demand: Demand, bits: int) -> Split | None:
        """The cache all in one width, and the best weights in what it leaves; None: they do not
        fit. It is what a server with a fixed cache does.
        """
        rest = memory - self.cost.nbytes(demand, bits)
        fitting = self._sizes[self._sizes <= rest]
        return self.at(memory, demand, int(fitting[-1])) if len(fitting) else None


def _slope(before: Sequence[float], after: Sequence[float]) -> float:
    """Damage for each byte saved."""
    return (after[1] - before[1]) / (before[0] - after[0])
