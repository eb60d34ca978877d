"""RaaS: Efficient Long-Decoding Inference with Reasoning-Aware Attention Sparsity.

Milestone tokens are attended to for a while and then never again. Each token carries the time at
which it was last of use, and the one whose time is longest past goes first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pliant.cache.policies.evicting import Evicting
from pliant.cache.policy import Entries, Layer, policy


@policy(
    "raas",
    kind="evict",
    paper="Efficient Long-Decoding Inference with Reasoning-Aware Attention Sparsity",
)
class RaaS(Evicting):
    """The tokens that were used last.

    A query uses a token that it gives a weight above `threshold`; of tokens last used by the same
    query the one that weighed more stays. sinks: the prompt's tokens, where all of it is to stay.
    """

    observes = True

    def __init__(
        self,
        layer: Layer,
        *,
        tokens: int = 512,
        recent: int = 32,
        sinks: int = 4,
        threshold: float = 0.01,
    ) -> None:
        super().__init__(layer, tokens=tokens, recent=recent, sinks=sinks)
        self.threshold = threshold
        self._asking: Tensor | None = None

    def add(self, new: Entries, queries: Tensor) -> None:
        super().add(new, queries)
        self._asking = new.positions[0].float()  # of the queries of this chunk

    def observe(self, weights: Tensor) -> None:
        assert self._asking is not None
        most = weights.view(self.layer.kv_heads, -1, *weights.shape[1:]).amax(1).float()
        times = (self._asking[:, None] + most).masked_fill(most <= self.threshold, 0)
        used, self._asking = self.mark("used"), None
        torch.maximum(used, times.amax(1), out=used)

    def importance(self) -> Tensor:
        return torch.maximum(self.mark("used"), self.entries.positions.float())
