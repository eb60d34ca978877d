"""What policies share that keep every token and attend to some: units of tokens, by centroids."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from pliant.cache.policies.keep import Keep
from pliant.cache.policy import STORED, Entries, Layer
from pliant.errors import PliantError

_NEVER = 1 << 30  # the position of what only fills up a row: behind every query
_ROUNDS = 8


class Retrieving(Keep):
    """Tokens behind the newest ones lie in units, each with a centroid; queries choose units.

    `share` of the tokens that lie in units are attended to, and all that do not lie in one yet.
    """

    def __init__(self, layer: Layer, *, share: float) -> None:
        super().__init__(layer)
        if not 0 < share <= 1:
            raise PliantError(f"the share of keys to attend to lies in (0, 1], not {share}")
        self.share = share
        self.labels: Tensor | None = None  # int32 [kv_heads, tokens in units]: their unit
        self.centroids: Tensor | None = None  # [kv_heads, units, key_dim]
        self.sizes: Tensor | None = None  # int32 [kv_heads, units]
        self._attended, self._compared = 0, 0

    @abstractmethod
    def choose(self, queries: Tensor) -> Tensor:
        """Units for `queries` [heads, n, key_dim] to attend to, bool [kv_heads, units]."""

    def read(self, queries: Tensor) -> Entries:
        whole = super().read(queries)
        if self.labels is None:
            self._attended = whole.positions.numel()
            return whole
        chosen = self.choose(queries)
        mask = torch.ones(whole.positions.shape, dtype=torch.bool, device=chosen.device)
        mask[:, : self.grouped] = chosen.gather(1, self.labels.long())
        self._attended = int(mask.sum())
        return picked(whole, mask)

    @property
    def grouped(self) -> int:
        """Tokens that lie in units: the first so many."""
        return 0 if self.labels is None else self.labels.shape[1]

    def group(self, labels: Tensor) -> None:
        """Put the tokens behind the grouped ones into units of their own, [kv_heads, m] from 0."""
        start, units = self.grouped, int(labels.max()) + 1
        keys = self.entries.keys[:, start : start + labels.shape[1]]
        sums, sizes = summed(keys.float(), labels, units)
        centroids = (sums / sizes.clamp(min=1)[..., None]).to(STORED)
        if self.labels is None or self.centroids is None or self.sizes is None:
            self.labels, self.centroids, self.sizes = labels.int(), centroids, sizes.int()
            return
        behind = (labels + self.centroids.shape[1]).int()
        self.labels = torch.cat([self.labels, behind], 1)
        self.centroids = torch.cat([self.centroids, centroids], 1)
        self.sizes = torch.cat([self.sizes, sizes.int()], 1)

    def scores(self, queries: Tensor) -> Tensor:
        """Scaled products of `queries` with centroids, [kv_heads, queries a head, units].

        Units that a head does not have score minus infinity.
        """
        assert self.centroids is not None
        assert self.sizes is not None
        self._compared += int(self.centroids.nbytes)
        grouped = queries.reshape(self.layer.kv_heads, -1, queries.shape[-1]).float()
        found = grouped @ self.centroids.float().transpose(1, 2) * self.layer.scale
        return found.masked_fill(self.sizes[:, None] == 0, -torch.inf)

    @property
    def nbytes(self) -> int:
        parts = (self.labels, self.centroids, self.sizes)
        return super().nbytes + sum(int(part.nbytes) for part in parts if part is not None)

    @property
    def read_bytes(self) -> int:
        """Of the last `read`: keys and values attended to, and centroids that were compared."""
        numbers = self.layer.key_dim + self.layer.value_dim
        return self._attended * numbers * STORED.itemsize + self._compared

    def add(self, new: Entries, queries: Tensor) -> None:
        super().add(new, queries)
        self._compared = 0


def picked(entries: Entries, mask: Tensor) -> Entries:
    """Those of `mask` [kv_heads, n], in order; short rows are filled up with what no query sees."""
    longest = int(mask.sum(1).max())
    order = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :longest]
    taken = entries.take(order)
    filled = taken.positions.masked_fill(~mask.gather(1, order), _NEVER)
    return Entries(taken.keys, taken.values, filled, taken.bias)


def within(worth: Tensor, sizes: Tensor, tokens: float) -> Tensor:
    """Which units [..., units] are in the best whose sizes come to at most `tokens`; bool.

    The best one always is, empty ones never are.
    """
    order = worth.argsort(dim=-1, descending=True)
    taken = sizes.gather(-1, order).cumsum(-1) <= tokens
    taken[..., 0] = True
    return torch.zeros_like(taken).scatter(-1, order, taken) & (sizes > 0)


def clusters(keys: Tensor, count: int) -> Tensor:
    """Labels [heads, n] of `count` clusters of keys [heads, n, dim] each, by k-means on directions.

    Begins with keys evenly spaced along the text, so that it gives the same each time.
    """
    directions = torch.nn.functional.normalize(keys.float(), dim=-1)
    places = torch.linspace(0, keys.shape[1] - 1, count, device=keys.device).long()
    centers = directions[:, places]
    for _ in range(_ROUNDS):
        labels = (directions @ centers.transpose(1, 2)).argmax(-1)
        sums, sizes = summed(directions, labels, count)
        fresh = torch.nn.functional.normalize(sums, dim=-1)
        centers = torch.where(sizes[..., None] > 0, fresh, centers)
    return (directions @ centers.transpose(1, 2)).argmax(-1)


def summed(rows: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Sums [heads, count, dim] of the `rows` [heads, n, dim] of each label, and how many."""
    index = labels.long()
    sums = rows.new_zeros(rows.shape[0], count, rows.shape[2])
    sums.scatter_add_(1, index[..., None].expand_as(rows), rows)
    sizes = rows.new_zeros(rows.shape[0], count)
    return sums, sizes.scatter_add_(1, index, torch.ones_like(index, dtype=rows.dtype))
