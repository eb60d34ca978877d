"""Bits by variance: keys and values in their principal axes, each axis with a width of its own.

Keys are coded before rotary embedding. What an error of a key costs is what queries make of it: its
channels are weighed by the queries' mean square, turned by the distances at which they look back.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from pliant.cache.codings import Transform
from pliant.cache.policies.coded import Coded, Prepared
from pliant.cache.policy import Entries, Layer, policy

_DISTANCES = 16


@policy("waterfill", kind="quantize", paper="")
class Waterfill(Coded):
    """`keys` and `values` bits a number on average; no bits for axes where there is nothing.

    Bases, widths and levels come from the sequence's first `fit` tokens, which stay as they are
    until all have been seen. joint: axes run through all heads, which share much; the basis, in
    `basis_bits` a number, takes more bytes. weighted: channels of keys by what queries make of
    them; reach: how far back they are taken to look.
    """

    def __init__(
        self,
        layer: Layer,
        *,
        keys: float = 2.5,
        values: float = 3.0,
        weighted: bool = True,
        reach: int = 1024,
        joint: bool = True,
        basis_bits: int = 5,
        sinks: int = 4,
        recent: int = 0,
        block: int = 32,
        fit: int = 508,
        prepared: Prepared | None = None,
    ) -> None:
        unturned = layer.rotary is not None
        super().__init__(layer, sinks=sinks, recent=recent, block=block, fit=fit, unturned=unturned)
        options: dict[str, Any] = {"joint": joint, "basis_bits": basis_bits}
        self.use(Transform(keys, **options), Transform(values, **options), prepared)
        self.weighted, self.reach = weighted, reach
        self.asked: Tensor | None = None  # sum of outer products of queries, before rotary

    def add(self, new: Entries, queries: Tensor) -> None:
        super().add(new, queries)
        if self.first is not None or not (self.weighted and self.fit):
            return
        assert self.hot is not None
        before = len(self.hot) - len(new)
        count = max(0, min(len(new), self.sinks + self.fit - before))
        asked = queries[:, :count].float()
        if self.rotary is not None:
            asked = self.rotary.turn(asked, new.positions[:1, :count], back=True)
        asked = asked.view(self.layer.kv_heads, -1, asked.shape[-1])
        moment = asked.mT @ asked
        self.asked = moment if self.asked is None else self.asked + moment

    def learn(self, keys: Tensor, values: Tensor) -> None:
        if self.asked is not None and isinstance(self.keys, Transform):
            self.keys.metric = self._seen_from_keys(self.asked).diagonal(dim1=1, dim2=2)
            self.asked = None
        super().learn(keys, values)

    def join(self, other: Self) -> None:
        if self.asked is not None and other.asked is not None:
            self.asked = self.asked + other.asked

    def _seen_from_keys(self, moment: Tensor) -> Tensor:
        """Second moment of queries as keys before rotary embedding meet them, over distances."""
        if self.rotary is None:
            return moment
        share = torch.arange(_DISTANCES, device=moment.device) / _DISTANCES
        by = (share.square() * self.reach).round()[:, None, None]
        by = by.expand(-1, *moment.shape[:2])
        turned = self.rotary.shift(moment.expand(_DISTANCES, -1, -1, -1), by)
        return self.rotary.shift(turned.mT, by).mT.mean(0)

    @property
    def fitted_nbytes(self) -> int:
        waiting = 0 if self.asked is None else int(self.asked.nbytes)
        return super().fitted_nbytes + waiting
