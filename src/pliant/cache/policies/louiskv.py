"""Fetch keys and values anew only where the text turns to something else.

Source: "LouisKV: Efficient KV Cache Retrieval for Long Input-Output Sequences".
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, pad

from pliant.cache.policies.retrieving import Retrieving, clusters, within
from pliant.cache.policy import Entries, Layer, policy


@policy("louiskv", kind="retrieve", paper="LouisKV")
class LouisKV(Retrieving):
    """Units of input are clusters of `cluster` keys, units of output what stands together.

    A boundary is where queries are less than `alike` (cosine, mean over heads) to those of the last
    one; there units are chosen anew and the segment of output closes, as it does at `segment`
    tokens. Chunks of at most `output` tokens are output. The `recent` newest tokens of the input
    wait for more; the first `sinks` and what is not yet in a unit are always attended to.
    fetched: bytes of keys and values of units that were not among the chosen ones before.
    """

    def __init__(
        self,
        layer: Layer,
        *,
        share: float = 0.25,
        cluster: int = 8,
        segment: int = 64,
        alike: float = 0.8,
        output: int = 32,
        recent: int = 32,
        sinks: int = 4,
    ) -> None:
        super().__init__(layer, share=share)
        self.cluster, self.segment, self.alike = cluster, segment, alike
        self.output, self.recent, self.sinks = output, recent, sinks
        self.chosen: Tensor | None = None
        self.at_boundary: Tensor | None = None  # queries there, mean over its chunk [heads, dim]
        self.fetched = 0
        self._is_output, self._turned, self._new = False, False, 0

    def add(self, new: Entries, queries: Tensor) -> None:
        super().add(new, queries)
        self._is_output, self._new = len(new) <= self.output, len(new)
        now, before = queries.mean(1).float(), self.at_boundary
        self._turned = (
            before is None or float(cosine_similarity(now, before, dim=-1).mean()) < self.alike
        )
        if not self._is_output:
            self.at_boundary, self._turned = None, True
        elif self._turned:
            self.at_boundary = now

    def choose(self, queries: Tensor) -> Tensor:
        assert self.sizes is not None
        known = self.chosen
        if known is not None and known.shape[1] < self.sizes.shape[1]:
            fresh = self.sizes.shape[1] - known.shape[1]
            known = pad(known, (0, fresh), value=True)  # closed since, and still there
        if known is None or self._turned:
            worth = self.scores(queries).softmax(-1).amax(1)
            tokens = self.share * float(self.sizes[0].sum())
            worth[:, 0] = torch.inf  # the sinks
            chosen = within(worth, self.sizes, tokens)
            moved = chosen if known is None else chosen & ~known
            numbers = self.layer.key_dim + self.layer.value_dim
            self.fetched += int(self.sizes[moved].sum()) * numbers * 2
            known = chosen
        self.chosen = known
        return known

    def settle(self) -> None:
        keys, waiting = self.entries.keys, len(self.entries) - self.grouped
        if self._is_output and self.labels is not None:
            full = waiting if waiting >= self.segment else 0
            closed = waiting - self._new if self._turned else full
            if closed:
                self.group(keys.new_zeros(len(keys), closed, dtype=torch.int32))
            return
        self.chosen = None  # what was attended to while reading the input is not kept at hand
        waiting -= self.recent
        if waiting <= max(self.cluster, self.sinks):
            return
        if self.labels is None:
            self.group(keys.new_zeros(len(keys), self.sinks, dtype=torch.int32))
            waiting -= self.sinks
        fresh = keys[:, self.grouped : self.grouped + waiting]
        self.group(clusters(fresh, max(1, waiting // self.cluster)).to(torch.int32))

    @property
    def nbytes(self) -> int:
        parts = (self.chosen, self.at_boundary)
        return super().nbytes + sum(int(part.nbytes) for part in parts if part is not None)
