"""Attend to keys whose cluster's centroid a query scores high, from among all.

Source: "Squeezed Attention: Accelerating Long Context Length LLM Inference".
"""

from __future__ import annotations

import torch
from torch import Tensor

from pliant.cache.policies.retrieving import Retrieving, clusters, within
from pliant.cache.policy import Layer, policy


@policy("squeezed", kind="retrieve", paper="Squeezed Attention")
class Squeezed(Retrieving):
    """Clusters of `cluster` keys on average; those with the most estimated weight are attended to.

    One threshold serves all heads of a layer, so that heads that look at few places leave more to
    others. The published clusters are of a prompt known beforehand; here tokens are clustered as
    soon as `block` of them lie behind the `recent` newest. Queries of one chunk and key head choose
    together, a cluster by the one that wants it most. All is kept: what gets less is `read_bytes`.
    One level of centroids.
    """

    def __init__(
        self,
        layer: Layer,
        *,
        share: float = 0.25,
        cluster: int = 8,
        block: int = 256,
        recent: int = 32,
    ) -> None:
        super().__init__(layer, share=share)
        self.cluster, self.block, self.recent = cluster, block, recent

    def choose(self, queries: Tensor) -> Tensor:
        assert self.sizes is not None
        scores = self.scores(queries)
        # the weight of one key of a cluster, were all keys of a cluster as its centroid is
        total = (scores + self.sizes.clamp(min=1).log()[:, None]).logsumexp(-1, keepdim=True)
        worth = (scores - total).exp().amax(1)  # [kv_heads, units], for whom it matters most
        tokens = self.share * self.sizes.sum()
        taken = within(worth.flatten(), self.sizes.flatten(), float(tokens))
        return taken.view(worth.shape)

    def settle(self) -> None:
        waiting = len(self.entries) - self.grouped - self.recent
        if waiting >= self.block:
            keys = self.entries.keys[:, self.grouped : self.grouped + waiting]
            self.group(clusters(keys, max(1, waiting // self.cluster)).to(torch.int32))
