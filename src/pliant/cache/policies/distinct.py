"""Distinct keys: tokens that say what few others say, and of those the ones that are asked for.

Not from a paper; what led here is in EXPERIMENTS.md. Attention so far tells little of what a later
token will look up: that is mostly something rare, a name or a number. Rare tokens have keys that
point away from the head's mean key once their positions are taken off. (R-KV takes redundancy from
keys with positions on, where neighbours look alike and far copies do not.) An entry's score is its
rank by that and its rank by the attention of the last queries; ranks need no common unit.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize

from pliant.cache.policies.evicting import Evicting
from pliant.cache.policies.merging import checked_share
from pliant.cache.policy import Layer, policy


@policy("distinct", kind="evict", paper="")
class Distinct(Evicting):
    """Tokens whose keys, without positions, are unlike the mean key, and those attended to.

    share: of attention in the score, the rest is distinctness. window: queries that attention is
    from. Models without rotary embedding have keys that carry no position.
    """

    observes = True

    def __init__(
        self,
        layer: Layer,
        *,
        tokens: int = 512,
        recent: int = 32,
        sinks: int = 4,
        share: float = 0.3,
        window: int = 32,
    ) -> None:
        super().__init__(layer, tokens=tokens, recent=recent, sinks=sinks)
        self.share, self.window = checked_share("share", share), window

    def observe(self, weights: Tensor) -> None:
        self.fade("attention", weights, self.window)

    def importance(self) -> Tensor:
        attended = ranks(self.mark("attention"))
        return self.share * attended + (1 - self.share) * ranks(self.distinctness())

    def distinctness(self) -> Tensor:
        """How far each key points away from the others' mean direction, [kv_heads, entries]."""
        keys, rotary = self.entries.keys.float(), self.layer.rotary
        if rotary is not None:
            keys = rotary.turn(keys, self.entries.positions, back=True)
        directions = normalize(keys, dim=-1)
        return -(directions * directions.mean(1, keepdim=True)).sum(-1)


def ranks(scores: Tensor) -> Tensor:
    """The rank of each of `scores` [heads, n] in its head, from 0 for the least."""
    return scores.argsort(1).argsort(1).float()
