"""R-KV: Redundancy-aware KV Cache Compression for Reasoning Models.

Long chains of thought repeat themselves, and every repetition draws attention. So a token's score
is its importance to the last queries less how much its key is like the others' keys; the newest of
tokens that are alike is not held to be redundant.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from pliant.cache.policies.evicting import Evicting
from pliant.cache.policies.merging import checked_share, cosines
from pliant.cache.policy import Layer, policy


@policy("rkv", kind="evict", paper="R-KV: Redundancy-aware KV Cache Compression")
class RKV(Evicting):
    """Tokens that the last queries attend to and whose keys are unlike those of others.

    share: of importance in the score, the rest is redundancy. window: queries that importance is
    from. alike: the cosine from which two keys are alike. pool: neighbours that share importance.
    """

    observes = True

    def __init__(
        self,
        layer: Layer,
        *,
        tokens: int = 512,
        recent: int = 32,
        sinks: int = 4,
        share: float = 0.1,
        window: int = 8,
        alike: float = 0.5,
        pool: int = 7,
    ) -> None:
        super().__init__(layer, tokens=tokens, recent=recent, sinks=sinks)
        self.share, self.window = checked_share("share", share), window
        self.alike, self.pool = alike, pool

    def observe(self, weights: Tensor) -> None:
        self.fade("attention", weights, self.window)

    def importance(self) -> Tensor:
        attention = self.mark("attention")
        attention = attention / attention.sum(1, keepdim=True)
        important = max_pool1d(attention, self.pool, 1, self.pool // 2)[:, : attention.shape[1]]
        return self.share * important - (1 - self.share) * self.redundancy()

    def redundancy(self) -> Tensor:
        """How much each key is like others, [kv_heads, entries], adding up to 1."""
        likeness = cosines(self.entries.keys, self.entries.keys)
        count = likeness.shape[-1]
        places = torch.arange(count, device=likeness.device)
        likeness[:, places, places] = 0
        newest = places.expand_as(likeness).masked_fill(likeness <= self.alike, 0).amax(-1)
        likeness.scatter_(2, newest[..., None], 0)  # each key spares the newest that is like it
        return likeness.mean(1).softmax(-1)
