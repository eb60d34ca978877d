"""MILLION: product quantization of keys and values, recent tokens uncoded.

Source: "MILLION: Mastering Long-Context LLM Inference Via Outlier-Immunized KV Product
Quantization".
"""

from __future__ import annotations

from pliant.cache.codings import Product
from pliant.cache.policies.coded import Coded, Prepared
from pliant.cache.policy import Layer, policy


@policy("million", kind="quantize", paper="MILLION")
class Million(Coded):
    """Codes of `sub` channels together, `bits` a number, from k-means on the first `fit` tokens.

    own: a codebook for each sub-vector, as published, instead of one a layer and side.
    """

    def __init__(
        self,
        layer: Layer,
        *,
        bits: int = 4,
        sub: int = 2,
        own: bool = False,
        unturned: bool = True,
        sinks: int = 4,
        recent: int = 32,
        block: int = 32,
        fit: int = 256,
        prepared: Prepared | None = None,
    ) -> None:
        super().__init__(layer, sinks=sinks, recent=recent, block=block, fit=fit, unturned=unturned)
        self.use(Product(bits, sub=sub, own=own), Product(bits, sub=sub, own=own), prepared)
