"""LowRank: a thin product, W = A B."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pliant.codes.base import Code, Stored, form, prefixed
from pliant.codes.dense import Dense
from pliant.errors import CorruptError, PliantError


@form("low_rank")
@dataclass(frozen=True, eq=False)
class LowRank(Code):
    """A [out, rank] times B [rank, in]; each factor is itself a code."""

    a: Code
    b: Code

    def __post_init__(self) -> None:
        if self.a.shape[1] != self.b.shape[0]:
            raise PliantError(f"factors of {self.a.shape} and {self.b.shape} do not multiply")

    @classmethod
    def from_factors(cls, a: Tensor, b: Tensor, dtype: torch.dtype = torch.float16) -> LowRank:
        """Dense factors in `dtype`; their columns and rows are balanced to the same norm."""
        a, b = a.float(), b.float()
        norm_a, norm_b = a.norm(dim=0), b.norm(dim=1)
        balance = torch.where((norm_a > 0) & (norm_b > 0), (norm_b / norm_a).sqrt(), 1.0)
        return cls(Dense((a * balance).to(dtype)), Dense((b / balance[:, None]).to(dtype)))

    @property
    def shape(self) -> tuple[int, int]:
        return self.a.shape[0], self.b.shape[1]

    @property
    def rank(self) -> int:
        return self.a.shape[1]

    def rows(self, index: slice | Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return (self.a.rows(index) @ self.b.decode()).to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        return prefixed("a", self.a) | prefixed("b", self.b)

    def meta(self) -> dict[str, Any]:
        return {"code": self.name, "a": self.a.meta(), "b": self.b.meta()}

    @classmethod
    def build(cls, stored: Stored) -> LowRank:
        a, b = stored.code("a"), stored.code("b")
        if a.shape[1] != b.shape[0]:
            raise CorruptError(f"factors of {a.shape} and {b.shape} do not multiply")
        return cls(a, b)
