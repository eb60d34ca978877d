"""KVQuant: keys before rotary embedding, levels where numbers are, outliers kept aside.

Source: "KVQuant: Towards 10 Million Context Length LLM Inference with KV Cache Quantization".
"""

from __future__ import annotations

from pliant.cache.codings import Nonuniform
from pliant.cache.policies.coded import Coded, Prepared
from pliant.cache.policy import Layer, policy


@policy("kvquant", kind="quantize", paper="KVQuant")
class KVQuant(Coded):
    """Keys per channel before rotary embedding, values per token, on fitted levels.

    Levels (one set a layer and side) and the channels' ranges come from the sequence's own first
    `fit` tokens, not from calibration; each weighs its channel's range in k-means. outliers: the
    share kept exact. q_norm None: at 2 bits, as published.
    """

    def __init__(
        self,
        layer: Layer,
        *,
        bits: int = 4,
        outliers: float = 0.01,
        uniform: bool = False,
        q_norm: bool | None = None,
        unturned: bool = True,
        sinks: int = 4,
        recent: int = 0,
        block: int = 32,
        fit: int = 256,
        prepared: Prepared | None = None,
    ) -> None:
        super().__init__(layer, sinks=sinks, recent=recent, block=block, fit=fit, unturned=unturned)
        q_norm = bits <= 2 if q_norm is None else q_norm
        keys, values = (
            Nonuniform(bits, per_channel=keys, outliers=outliers, uniform=uniform, q_norm=q_norm)
            for keys in (True, False)
        )
        self.use(keys, values, prepared)
