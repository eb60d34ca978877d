"""ColumnStack: one matrix in slices of input channels, each its own code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pliant.codes.base import Code, Stored, form, prefixed
from pliant.errors import CorruptError, PliantError


@form("column_stack")
@dataclass(frozen=True, eq=False)
class ColumnStack(Code):
    """W = [parts[0], parts[1], ...], side by side along the input axis.

    Inside a `Permuted` it gives any set of input channels a code of their own.
    """

    parts: tuple[Code, ...]

    def __post_init__(self) -> None:
        if len({part.shape[0] for part in self.parts}) != 1:
            raise PliantError(f"parts need one height, not {[p.shape for p in self.parts]}")

    @property
    def shape(self) -> tuple[int, int]:
        return self.parts[0].shape[0], sum(part.shape[1] for part in self.parts)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [..., in] cut into the slices that the parts take."""
        return tuple(torch.split(x, [part.shape[1] for part in self.parts], dim=-1))

    def rows(self, index: slice | Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.cat([part.rows(index, dtype) for part in self.parts], dim=1)

    def tensors(self) -> dict[str, Tensor]:
        flat: dict[str, Tensor] = {}
        for i, part in enumerate(self.parts):
            flat |= prefixed(f"parts.{i}", part)
        return flat

    def meta(self) -> dict[str, Any]:
        return {"code": self.name, "parts": [part.meta() for part in self.parts]}

    @classmethod
    def build(cls, stored: Stored) -> ColumnStack:
        parts = stored.codes("parts")
        if len({part.shape[0] for part in parts}) != 1:
            raise CorruptError(f"parts need one height, not {[p.shape for p in parts]}")
        return cls(parts)
