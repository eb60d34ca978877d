"""CSKV: fewer channels of keys and values, and a recent window of all of them.

Source: "CSKV: Training-Efficient Channel Shrinking for KV Cache in Long-Context Scenarios".
"""

from __future__ import annotations

from pliant.cache.codings import Grid, LowRank
from pliant.cache.policies.coded import Coded, Prepared
from pliant.cache.policy import Layer, policy


@policy("cskv", kind="factorize", paper="CSKV")
class CSKV(Coded):
    """The shares `keys` and `values` of channels, in bases of the first `fit` tokens.

    Keys are shrunk before rotary embedding, as where the published method splits their projection.
    joint: bases over all heads of a layer. bits: of coefficients, 16 or on uniform grids, per
    channel of keys and per token of values. The bases are not trained further.
    """

    def __init__(
        self,
        layer: Layer,
        *,
        keys: float = 0.5,
        values: float = 0.5,
        bits: int = 16,
        joint: bool = False,
        unturned: bool = True,
        sinks: int = 4,
        recent: int = 32,
        block: int = 32,
        fit: int = 256,
        prepared: Prepared | None = None,
    ) -> None:
        super().__init__(layer, sinks=sinks, recent=recent, block=block, fit=fit, unturned=unturned)

        def shrunk(share: float, dim: int, per_channel: bool) -> LowRank:
            inner = None if bits == 16 else Grid(bits, per_channel=per_channel)
            return LowRank(max(1, min(dim, round(share * dim))), joint=joint, inner=inner)

        self.use(
            shrunk(keys, layer.key_dim, True), shrunk(values, layer.value_dim, False), prepared
        )
