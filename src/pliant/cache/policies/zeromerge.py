"""ZeroMerge: Parameter-Free KV Cache Compression for Memory-Efficient Long-Context LLMs.

The budget is for recent tokens, for those that draw the most attention, and for a few residual
entries, which take in all that the others let go: each goes to the residual with the likest key,
as a running mean. The score of a residual is raised by the logarithm of the tokens it stands for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pliant.cache.policies.merging import Merging, checked_share
from pliant.cache.policy import Layer, policy


@policy("zeromerge", kind="merge", paper="ZeroMerge: Parameter-Free KV Cache Compression")
class ZeroMerge(Merging):
    """The recent tokens, those most attended to, and residuals that the others are merged into.

    recent: by default a quarter of `tokens`. residuals: the share of `tokens` that is residuals.
    """

    observes = True

    def __init__(
        self,
        layer: Layer,
        *,
        tokens: int = 512,
        recent: int | None = None,
        sinks: int = 4,
        residuals: float = 0.1,
    ) -> None:
        recent = tokens // 4 if recent is None else recent
        super().__init__(layer, tokens=tokens, recent=recent, sinks=sinks)
        room = tokens - sinks - recent
        self.residuals = min(max(int(checked_share("residuals", residuals) * tokens), 1), room)

    def observe(self, weights: Tensor) -> None:
        self.mark("mass").add_(self.per_kv_head(weights).sum(1))

    def importance(self) -> Tensor:
        return self.mark("mass").masked_fill(self.mark("residual") > 0, torch.inf)

    def settle(self) -> None:
        if len(self.entries) <= self.tokens:
            return
        chosen = self.choose(self.importance())
        residual = self.mark("residual").gather(1, chosen)
        if not residual.any():  # the first time: the least of those that stay
            worth = self.mark("mass").gather(1, chosen)
            worth[:, : self.sinks] = worth[:, self.tokens - self.recent :] = torch.inf
            least = worth.topk(self.residuals, dim=1, largest=False).indices
            residual.scatter_(1, least, 1)
            self.mark("residual").scatter_(1, chosen, residual)
        keys = self.entries.keys.float()
        centres = keys.gather(1, chosen[..., None].expand(-1, -1, keys.shape[-1]))
        scores = keys @ centres.transpose(1, 2)
        into = scores.masked_fill(residual[:, None] == 0, -torch.inf).argmax(-1)
        self.merge(chosen, into)
