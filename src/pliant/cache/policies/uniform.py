"""Pages as the serving engine codes them: keys per channel, values per token, uniform grids.

Sources: "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache"; `pliant.cache.encoding`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pliant.cache.codings import Parts
from pliant.cache.encoding import PAGE_TOKENS, PageShape, decode, encode
from pliant.cache.policies.coded import Coded
from pliant.cache.policy import STORED, Layer, policy
from pliant.errors import PliantError


@policy("uniform", kind="quantize", paper="KIVI")
class Uniform(Coded):
    """Full pages of 16 tokens at `bits` (8, 4, 3 or 2) a number; the page being filled is exact."""

    def __init__(self, layer: Layer, *, bits: int = 4, sinks: int = 0, recent: int = 0) -> None:
        super().__init__(
            layer, sinks=sinks, recent=recent, block=PAGE_TOKENS, fit=0, unturned=False
        )
        self.bits = bits
        self.shape = PageShape(1, layer.kv_heads, layer.key_dim, layer.value_dim, dtype=STORED)
        self.shape.nbytes(bits)  # refuses other widths
        if bits == self.shape.bits:
            raise PliantError("the policy keep keeps 16 bits")

    def encode(self, keys: Tensor, values: Tensor) -> Parts:
        rows = [side.transpose(1, 2).flatten(2) for side in (keys, values)]
        shape = replace(self.shape, layers=len(keys))  # pages lie where layers do
        return (encode(torch.cat(rows, -1), shape, self.bits),)

    def decode(self, parts: Parts) -> tuple[Tensor, Tensor]:
        states = decode(parts[0], self.shape, self.bits, torch.float32)
        keys, values = (
            side.reshape(*side.shape[:2], self.layer.kv_heads, -1).transpose(1, 2)
            for side in (states[..., : self.shape.keys], states[..., self.shape.keys :])
        )
        return keys, values

    @property
    def fitted_nbytes(self) -> int:
        return 0
