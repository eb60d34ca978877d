"""Elastic Cache: Efficient Inference of Vision Instruction-Following Models with Elastic Cache.

Reading and writing are two things. What is read is ranked by the attention it draws: the top tokens
are anchors, and those between are merged into the nearest one. While writing, a token a time, the
entry that lies a fixed distance from the end goes, so that the first and the recent stay.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pliant.cache.policies.merging import Merging
from pliant.cache.policy import Entries, Layer, policy


@policy("elastic", kind="merge", paper="Efficient Inference with Elastic Cache")
class Elastic(Merging):
    """Anchors that draw the most attention, with their neighbours merged into them.

    offset: how far from the end entries leave while tokens come one at a time; by default half of
    `tokens`.
    """

    observes = True
    counted = False

    def __init__(
        self,
        layer: Layer,
        *,
        tokens: int = 512,
        recent: int = 32,
        sinks: int = 4,
        offset: int | None = None,
    ) -> None:
        super().__init__(layer, tokens=tokens, recent=recent, sinks=sinks)
        self.offset = tokens // 2 if offset is None else min(max(offset, 1), tokens - sinks)
        self._writing = False

    def add(self, new: Entries, queries: Tensor) -> None:
        super().add(new, queries)
        self._writing = len(new) == 1

    def observe(self, weights: Tensor) -> None:
        self.mark("mass").add_(self.per_kv_head(weights).sum(1))

    def importance(self) -> Tensor:
        return self.mark("mass")

    def settle(self) -> None:
        count = len(self.entries)
        if count <= self.tokens:
            return
        places = torch.arange(count, device=self.entries.keys.device)
        if self._writing:
            self.evict(places[places != count - 1 - self.offset].expand(self.layer.kv_heads, -1))
            return
        chosen = self.choose(self.importance())
        into = nearest(chosen, places.expand(len(chosen), -1).contiguous())
        self.merge(chosen, into)


def nearest(chosen: Tensor, places: Tensor) -> Tensor:
    """Which of `chosen` [heads, m], which rise, is nearest to each of `places` [heads, n]."""
    after = torch.searchsorted(chosen, places).clamp_max(chosen.shape[1] - 1)
    before = (after - 1).clamp_min(0)
    left, right = places - chosen.gather(1, before), chosen.gather(1, after) - places
    return torch.where(left < right, before, after)
