"""H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models.

A few tokens, the heavy hitters, draw most of the attention that all queries ever gave. Half of the
budget goes to them and half to the recent tokens, which have had no time to collect any.
"""

from __future__ import annotations

from torch import Tensor

from pliant.cache.policies.evicting import Evicting
from pliant.cache.policy import Layer, policy


@policy("h2o", kind="evict", paper="H2O: Heavy-Hitter Oracle for Efficient Generative Inference")
class H2O(Evicting):
    """The recent tokens and those that drew the most attention so far.

    recent: by default half of `tokens`.
    """

    observes = True

    def __init__(
        self, layer: Layer, *, tokens: int = 512, recent: int | None = None, sinks: int = 0
    ) -> None:
        recent = tokens // 2 if recent is None else recent
        super().__init__(layer, tokens=tokens, recent=recent, sinks=sinks)

    def observe(self, weights: Tensor) -> None:
        self.mark("mass").add_(self.per_kv_head(weights).sum(1))

    def importance(self) -> Tensor:
        return self.mark("mass")
