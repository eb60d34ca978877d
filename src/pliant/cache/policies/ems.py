"""EMS: Adaptive Evict-then-Merge Strategy for Head-wise KV Cache Compression.

Attention summed over all queries favours old tokens, over the last ones those nearby: the score is
of both. Each head evicts what scores least and merges the rest of what it cannot keep into the kept
token with the likest key. A centre of zeros takes what is like none, so that heads, which merge
different numbers of tokens, go in parallel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pliant.cache.policies.merging import Merging, cosines
from pliant.cache.policy import Layer, policy


@policy("ems", kind="evict", paper="EMS: Adaptive Evict-then-Merge Strategy for KV Cache")
class EMS(Merging):
    """The tokens of the highest global and local attention, others merged into them or dropped.

    window: queries of the local score. merges: of what cannot stay, the share that is merged where
    the cosine of keys is above `alike`.
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
        window: int = 32,
        merges: float = 0.5,
        alike: float = 0.6,
    ) -> None:
        super().__init__(layer, tokens=tokens, recent=recent, sinks=sinks)
        self.window, self.merges, self.alike = window, merges, alike

    def observe(self, weights: Tensor) -> None:
        self.mark("global").add_(self.per_kv_head(weights).sum(1))
        self.fade("local", weights, self.window)

    def importance(self) -> Tensor:
        """Of each score the part that an entry has of the head's, added up."""
        marks = [self.mark("global"), self.mark("local")]
        return sum((mark / mark.sum(1, keepdim=True) for mark in marks), torch.zeros(()))

    def settle(self) -> None:
        count = len(self.entries)
        if count <= self.tokens:
            return
        score = self.importance()
        chosen = self.choose(score)
        keys = self.entries.keys
        centres = keys.gather(1, chosen[..., None].expand(-1, -1, keys.shape[-1]))
        likeness, into = cosines(keys, centres).max(-1)
        spare = score.scatter(1, chosen, -torch.inf)
        rank = spare.argsort(1, descending=True).argsort(1)
        zero = (likeness <= self.alike) | (rank >= self.merges * (count - self.tokens))
        self.merge(chosen, into.masked_fill(zero, self.tokens), score.clamp_min(1e-6))
