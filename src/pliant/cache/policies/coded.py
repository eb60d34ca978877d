"""What policies share that code tokens in blocks: exact first tokens, blocks, an exact tail.

Codings of a side (keys or values) are values of their own in `pliant.cache.codings`, and wrap each
other there; a policy is a choice of the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from pliant.cache.codings import Coding, Parts, nbytes
from pliant.cache.policy import STORED, Entries, Layer, Policy
from pliant.errors import PliantError

Prepared = Sequence[tuple[Coding, Coding]]
"""Codings of keys and of values that were fitted beforehand, of each layer."""


class Coded(Policy):
    """The first `sinks` tokens and the last `recent` in bfloat16; between them coded blocks.

    block: tokens coded together; a tail that fills none stays as it is. fit: how many tokens after
    the first ones the codings are fitted on; until they have been seen nothing is coded. unturned:
    code keys as they are before rotary embedding. `prepared` codings, fitted to other text, hold
    for all sequences of a model; each counts them as its own all the same. What is kept does not
    depend on how the sequence was cut into chunks, once the first blocks are coded.
    """

    keys: Coding
    values: Coding

    def __init__(
        self, layer: Layer, *, sinks: int, recent: int, block: int, fit: int, unturned: bool
    ) -> None:
        super().__init__(layer)
        if min(sinks, recent, fit) < 0 or block < 1:
            raise PliantError(
                f"blocks have a token or more, and sinks, recent and fit are not negative: "
                f"{block}, {sinks}, {recent}, {fit}"
            )
        self.sinks, self.recent, self.block, self.fit = sinks, recent, block, fit
        self.rotary = self.needs_rotary() if unturned else None
        self.first: Entries | None = None
        self.hot: Entries | None = None
        self.coded: Parts = ()
        self.blocks = 0

    def use(self, keys: Coding, values: Coding, prepared: Prepared | None) -> None:
        """Code with these, or with what `prepared` has of this layer, which needs no fit."""
        if prepared is not None:
            if len(prepared) != self.layer.layers:
                raise PliantError(
                    f"codings were prepared for {len(prepared)} layers, and the model has "
                    f"{self.layer.layers}; prepare them on this model"
                )
            keys, values = prepared[self.layer.index]
            self.fit = 0
        self.keys, self.values = keys, values

    def add(self, new: Entries, queries: Tensor) -> None:
        new = Entries(new.keys.to(STORED), new.values.to(STORED), new.positions)
        self.hot = new if self.hot is None else Entries.cat([self.hot, new])

    def read(self, queries: Tensor) -> Entries:
        parts = [] if self.first is None else [_in(self.first, queries.dtype)]
        if self.blocks:
            parts.append(_in(self._decoded(), queries.dtype))
        assert self.hot is not None
        return Entries.cat([*parts, _in(self.hot, queries.dtype)])

    def settle(self) -> None:
        hot = self.hot
        assert hot is not None
        if self.first is None:
            if len(hot) < self.sinks + max(self.fit, self.recent + self.block):
                return
            self.first = _part(hot, 0, self.sinks)
            hot = _part(hot, self.sinks, len(hot))
            self.start = int(hot.positions[0, 0])
            if self.fit:
                self.learn(*self.sides(_part(hot, 0, self.fit)))
        count = max(len(hot) - self.recent, 0) // self.block
        if count:
            full = count * self.block
            new = self.encode(*(
                side.view(len(side), count, self.block, -1).transpose(0, 1)
                for side in self.sides(_part(hot, 0, full))
            ))  # fmt: skip
            old = self.coded or tuple(part[:0] for part in new)
            self.coded = tuple(torch.cat(pair) for pair in zip(old, new, strict=True))
            self.blocks += count
            hot = _part(hot, full, len(hot))
        self.hot = hot

    def learn(self, keys: Tensor, values: Tensor) -> None:
        """Fit the codings to the first tokens, float32 [kv_heads, n, dim] each."""
        self.keys.fit(keys)
        self.values.fit(values)

    def seen(self) -> tuple[Tensor, Tensor]:
        """What there is to learn from while nothing is coded."""
        assert self.hot is not None
        return self.sides(_part(self.hot, self.sinks, len(self.hot)))

    def join(self, other: Self) -> None:
        """Add to what is to be learnt what `other` saw beside keys and values."""

    def encode(self, keys: Tensor, values: Tensor) -> Parts:
        """Codes of [blocks, kv_heads, tokens, dim] each; every part's rows are blocks."""
        coded = self.keys.encode(keys)
        self._cut = len(coded)
        return (*coded, *self.values.encode(values))

    def decode(self, parts: Parts) -> tuple[Tensor, Tensor]:
        """What `encode` coded."""
        return self.keys.decode(parts[: self._cut]), self.values.decode(parts[self._cut :])

    @property
    def nbytes(self) -> int:
        exact = [e for e in (self.first, self.hot) if e is not None]
        kept = sum(int(e.keys.nbytes + e.values.nbytes) for e in exact) + nbytes(self.coded)
        return kept + self.fitted_nbytes

    @property
    def fitted_nbytes(self) -> int:
        """Bytes of what the codings were fitted to."""
        return self.keys.nbytes + self.values.nbytes

    def sides(self, entries: Entries) -> tuple[Tensor, Tensor]:
        """Keys and values as they are coded, float32 [kv_heads, n, dim]."""
        keys = entries.keys.float()
        if self.rotary is not None:
            keys = self.rotary.turn(keys, entries.positions, back=True)
        return keys, entries.values.float()

    def _decoded(self) -> Entries:
        keys, values = (side.transpose(0, 1).flatten(1, 2) for side in self.decode(self.coded))
        positions = torch.arange(keys.shape[1], device=keys.device) + self.start
        positions = positions.expand(len(keys), -1)
        if self.rotary is not None:
            keys = self.rotary.turn(keys, positions)
        return Entries(keys, values, positions)


def _part(entries: Entries, start: int, stop: int) -> Entries:
    """Entries from `start` to `stop`, in memory of their own."""
    keys, values, positions = (
        side[:, start:stop].clone() for side in (entries.keys, entries.values, entries.positions)
    )
    return Entries(keys, values, positions)


def _in(entries: Entries, dtype: torch.dtype) -> Entries:
    return Entries(entries.keys.to(dtype), entries.values.to(dtype), entries.positions)
