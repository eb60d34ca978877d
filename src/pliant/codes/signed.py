"""Signed: a sign for each weight, times the matrix of another code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pliant.codes.base import Code, Stored, form, one_thread, prefixed, row_tiles
from pliant.codes.packing import pack, plane_bytes, unpack
from pliant.errors import PliantError


@form("signed")
@dataclass(frozen=True, eq=False)
class Signed(Code):
    """W = S * inner, element by element, S of +1 and -1 in one bit each.

    The inner code holds magnitudes, a smooth matrix that few factors describe.
    """

    signs: Tensor  # uint8 [out, ceil(in / 8)], a set bit for +1
    inner: Code

    def __post_init__(self) -> None:
        expected = (self.inner.shape[0], plane_bytes(self.inner.shape[1], 1))
        if self.signs.dtype != torch.uint8 or tuple(self.signs.shape) != expected:
            raise PliantError(
                f"signs must be uint8 {list(expected)}, "
                f"not {self.signs.dtype} {list(self.signs.shape)}"
            )

    @classmethod
    def of(cls, positive: Tensor, inner: Code) -> Signed:
        """positive: bool [out, in], true where the sign is +1."""
        return cls(pack(positive, 1)[0], inner)

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    def rows(self, index: slice | Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        values, signs = self.inner.rows(index), self.signs[index]
        with one_thread():
            for tile in row_tiles(values.shape[0], self.shape[1], self.device):
                values[tile] *= _plus_minus(signs[tile], self.shape[1])
        return values.to(dtype)

    def sign_rows(self, index: slice) -> Tensor:
        """S alone, float32 [n, in]."""
        return _plus_minus(self.signs[index], self.shape[1])

    def tensors(self) -> dict[str, Tensor]:
        return {"signs": self.signs, **prefixed("inner", self.inner)}

    def meta(self) -> dict[str, Any]:
        return {"code": self.name, "inner": self.inner.meta()}

    @classmethod
    def build(cls, stored: Stored) -> Signed:
        inner = stored.code("inner")
        out, width = inner.shape
        return cls(stored.tensor("signs", (out, plane_bytes(width, 1)), torch.uint8), inner)


def _plus_minus(packed: Tensor, width: int) -> Tensor:
    return unpack((packed,), 1, width).float().mul_(2.0).sub_(1.0)
