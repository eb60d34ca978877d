"""Efficient Long-Context LLM Inference via KV Cache Clustering (Chelsea).

Keys of neighbours are alike. Chunked soft matching: inside a chunk of the text every other token
looks for the likest key among those between, and the pairs that are most alike are merged into
centroids, which stand for as many tokens as they took in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pliant.cache.policies.merging import Merging, cosines
from pliant.cache.policy import Layer, policy
from pliant.errors import PliantError


@policy("chelsea", kind="merge", paper="Efficient Long-Context LLM Inference via KV Clustering")
class Chelsea(Merging):
    """Clusters of tokens with like keys, made of pairs within chunks.

    chunk: entries that are matched with each other, an even number.
    """

    def __init__(
        self,
        layer: Layer,
        *,
        tokens: int = 512,
        recent: int = 32,
        sinks: int = 4,
        chunk: int = 64,
    ) -> None:
        super().__init__(layer, tokens=tokens, recent=recent, sinks=sinks)
        if chunk < 2 or chunk % 2:
            raise PliantError(f"chunks are of an even number of entries, not {chunk}")
        self.chunk = chunk

    def importance(self) -> Tensor:
        """How unlike its likest partner an entry is; partners, which stay, are infinitely so."""
        first, end = self.free()
        middle = self.entries.keys[:, first:end]
        likest, _ = self.match(middle)
        worth = torch.full(self.entries.positions.shape, torch.inf, device=middle.device)
        worth[:, first:end:2] = -likest
        return worth

    def match(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Of entries 0, 2, 4... of `keys` the cosine with the likest of 1, 3, 5..., and which."""
        likeness = cosines(keys[:, ::2], keys[:, 1::2])
        seekers, partners = (
            torch.arange(count, device=keys.device) // (self.chunk // 2)
            for count in likeness.shape[1:]
        )
        elsewhere = seekers[:, None] != partners
        likest, which = likeness.masked_fill(elsewhere, -torch.inf).max(-1)
        return likest, which

    def settle(self) -> None:
        while (count := len(self.entries)) > self.tokens:
            first, end = self.free()
            going = min(count - self.tokens, (end - first) // 2)  # a pass halves at most
            leaves = self.importance().topk(going, dim=1, largest=False).indices
            stays = torch.ones_like(self.entries.positions, dtype=torch.bool)
            stays.scatter_(1, leaves, False)
            chosen = stays.nonzero()[:, 1].view(len(stays), -1)
            _, which = self.match(self.entries.keys[:, first:end])
            slot = stays.cumsum(1) - 1  # of each entry along `chosen`
            into = slot.clone()
            into[:, first:end:2] = slot.gather(1, first + 1 + 2 * which)
            self.merge(chosen, into)
