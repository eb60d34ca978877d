"""Mustafar: what is largest of each token's keys and values, behind a dense recent window.

Source: "Mustafar: Promoting Unstructured Sparsity for KV Cache Pruning in LLM Inference".
"""

from __future__ import annotations

from pliant.cache.codings import Grid, Sparse
from pliant.cache.codings.coding import Coding
from pliant.cache.policies.coded import Coded
from pliant.cache.policy import Layer, policy


@policy("mustafar", kind="sparsify", paper="Mustafar")
class Mustafar(Coded):
    """The shares `keys` and `values` of each token and head stay, found by a bitmap.

    bits: of what stays, 16 or on a uniform grid per token.
    """

    def __init__(
        self,
        layer: Layer,
        *,
        keys: float = 0.5,
        values: float = 0.5,
        bits: int = 16,
        sinks: int = 0,
        recent: int = 32,
        block: int = 32,
    ) -> None:
        super().__init__(layer, sinks=sinks, recent=recent, block=block, fit=0, unturned=False)

        def sparse(share: float, dim: int) -> Coding:
            inner = None if bits == 16 else Grid(bits, per_channel=False)
            return Sparse(min(dim, round(share * dim)), inner=inner)

        self.use(sparse(keys, layer.key_dim), sparse(values, layer.value_dim), None)
