"""Rotated: a code stored in a rotated basis of its inputs, where outliers are spread out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pliant.codes.base import Code, Stored, form, prefixed


@form("rotated")
@dataclass(frozen=True, eq=False)
class Rotated(Code):
    """W = inner Q^T with Q = diag(signs) H, orthonormal, so that W x = inner (Q^T x).

    H is block diagonal: Hadamard matrices of the powers of two that the width is made of, the
    largest first (576 = 512 + 64). The signs follow from `seed`, so nothing more is stored.
    """

    inner: Code
    seed: int

    @staticmethod
    def rotate(x: Tensor, seed: int) -> Tensor:
        """x Q for x [..., in]: what to quantize, and what an activation becomes. float32."""
        x = x.float()
        return _hadamard(x * _signs(x.shape[-1], seed).to(x.device))

    @staticmethod
    def unrotate(x: Tensor, seed: int) -> Tensor:
        """x Q^T, the inverse of `rotate`. float32."""
        return _hadamard(x.float()) * _signs(x.shape[-1], seed).to(x.device)

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    def rows(self, index: slice | Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.unrotate(self.inner.rows(index), self.seed).to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        return prefixed("inner", self.inner)

    def meta(self) -> dict[str, Any]:
        return {"code": self.name, "inner": self.inner.meta(), "seed": self.seed}

    @classmethod
    def build(cls, stored: Stored) -> Rotated:
        return cls(stored.code("inner"), stored.integer("seed", 0, 2**32 - 1))


def blocks(width: int) -> list[int]:
    """The powers of two that add up to `width`, the largest first."""
    return [1 << k for k in reversed(range(width.bit_length())) if width >> k & 1]


@lru_cache(maxsize=64)
def _signs(width: int, seed: int) -> Tensor:
    """+1 or -1 for each input, by SplitMix64 so that they never change between versions."""
    with np.errstate(over="ignore"):
        index = np.arange(1, width + 1, dtype=np.uint64) + (np.uint64(seed) << np.uint64(32))
        z = index * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        bit = (z ^ (z >> np.uint64(31))) >> np.uint64(63)
    return torch.from_numpy(1.0 - 2.0 * bit.astype(np.float32))


@lru_cache(maxsize=64)
def _factor(size: int, device: torch.device) -> Tensor:
    """The orthonormal Hadamard matrix of a small power of two."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (matrix / math.sqrt(size)).to(device)


def _hadamard(x: Tensor) -> Tensor:
    """x H for x [..., width] in float32; H is symmetric and its own inverse."""
    pieces = [_block(piece) for piece in torch.split(x, blocks(x.shape[-1]), dim=-1)]
    return torch.cat(pieces, -1) if len(pieces) != 1 else pieces[0]


def _block(x: Tensor) -> Tensor:
    """One power-of-two block, as a Kronecker product of factors of at most 64."""
    size = x.shape[-1]
    if size <= 64:
        return x @ _factor(size, x.device)
    inner = x.reshape(*x.shape[:-1], size // 64, 64) @ _factor(64, x.device)
    return _block(inner.transpose(-1, -2)).transpose(-1, -2).flatten(-2)
