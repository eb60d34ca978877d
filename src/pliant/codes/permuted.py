"""Permuted: a code whose inputs are in another order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pliant.codes.base import Code, Stored, form, prefixed
from pliant.codes.indices import compact, index_type
from pliant.errors import CorruptError, PliantError


@form("permuted")
@dataclass(frozen=True, eq=False)
class Permuted(Code):
    """W[:, order] = inner: column j of the inner code is column order[j] of the matrix."""

    inner: Code
    order: Tensor  # [in], uint8, uint16 or int32

    @classmethod
    def by(cls, inner: Code, order: Tensor) -> Permuted:
        """`order` is any integer tensor that is a permutation of the inputs."""
        if not _is_permutation(order, inner.shape[1]):
            raise PliantError(f"order must be a permutation of {inner.shape[1]} inputs")
        return cls(inner, compact(order, inner.shape[1]))

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    def gather(self, x: Tensor) -> Tensor:
        """x [..., in] in the inner code's order."""
        return x.index_select(-1, self.order.to(torch.int64))

    def rows(self, index: slice | Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        inverse = torch.argsort(self.order.to(torch.int64))
        return self.inner.rows(index, dtype).index_select(1, inverse)

    def tensors(self) -> dict[str, Tensor]:
        return prefixed("inner", self.inner) | {"order": self.order}

    def meta(self) -> dict[str, Any]:
        return {"code": self.name, "inner": self.inner.meta()}

    @classmethod
    def build(cls, stored: Stored) -> Permuted:
        inner = stored.code("inner")
        width = inner.shape[1]
        order = stored.tensor("order", (width,), index_type(width))
        if not _is_permutation(order, width):
            raise CorruptError(f"order is no permutation of {width} inputs")
        return cls(inner, order)


def _is_permutation(order: Tensor, width: int) -> bool:
    every = torch.arange(width, device=order.device)
    return order.shape == (width,) and torch.equal(order.to(torch.int64).sort().values, every)
