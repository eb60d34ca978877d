"""Uniform grids between the least and the greatest value, per channel or per token of a block.

Sources: "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache".
"""

from __future__ import annotations

from torch import Tensor

from pliant.cache.codings.coding import Coding, Parts, check_bits, join, split
from pliant.cache.encoding import on_grid
from pliant.codes.packing import PLANES


class Grid(Coding):
    """`bits` a number; steps and starts float16, of a channel's tokens or of a token's channels."""

    def __init__(self, bits: int, *, per_channel: bool) -> None:
        super().__init__()
        check_bits(bits)
        self.bits, self.dim = bits, 2 if per_channel else 3

    def encode(self, states: Tensor) -> Parts:
        self._shape = tuple(states.shape[1:])
        codes, step, start = on_grid(states, self.bits, self.dim)
        return (*join(codes, self.bits), step, start)

    def decode(self, parts: Parts) -> Tensor:
        planes = len(PLANES[self.bits])
        codes = split(parts[:planes], self.bits, self._shape)
        return codes * parts[planes].float() + parts[planes + 1].float()
