"""What a coding of keys or of values is, and small integers of blocks in bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import prod

import torch
from torch import Tensor

from pliant.codes.packing import PLANES, pack, unpack
from pliant.errors import PliantError

Parts = tuple[Tensor, ...]
"""What blocks are kept as: a row of each tensor is a block."""


class Coding(ABC):
    """How blocks of one side are coded. `fitted`: what holds for all blocks of the sequence."""

    def __init__(self) -> None:
        self.fitted: Parts = ()

    def fit(self, sample: Tensor) -> None:  # noqa: B027 (some have nothing to fit)
        """Fit to the sequence's first tokens, float32 [kv_heads, n, dim]."""

    @abstractmethod
    def encode(self, states: Tensor) -> Parts:
        """Codes of `states`, float32 [blocks, kv_heads, tokens, dim]."""

    @abstractmethod
    def decode(self, parts: Parts) -> Tensor:
        """What `encode` coded, to its error; float32."""

    @property
    def nbytes(self) -> int:
        """Bytes of what was fitted."""
        return nbytes(self.fitted)


class Exact(Coding):
    """No coding: bfloat16. What others wrap when nothing further is wanted."""

    def encode(self, states: Tensor) -> Parts:
        return (states.to(torch.bfloat16),)

    def decode(self, parts: Parts) -> Tensor:
        return parts[0].float()


def join(codes: Tensor, bits: int) -> Parts:
    """Planes of `codes` [blocks, ...] below 2**bits, each [blocks, bytes]."""
    return pack(codes.flatten(1), bits)


def split(planes: Parts, bits: int, shape: tuple[int, ...]) -> Tensor:
    """Codes uint8 [blocks, *shape] of `planes`."""
    return unpack(planes, bits, prod(shape)).reshape(-1, *shape)


def nbytes(parts: Parts) -> int:
    """Bytes of all of them."""
    return sum(int(part.nbytes) for part in parts)


def check_bits(bits: int) -> None:
    """PliantError where no planes hold so many bits."""
    if bits not in PLANES:
        raise PliantError(f"codes have 1 to 8 bits, not {bits}")
