"""Sum: codes of one shape added up, as a base and its correction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pliant.codes.base import Code, Stored, form, prefixed
from pliant.codes.sparse import Sparse
from pliant.errors import CorruptError, PliantError


@form("sum")
@dataclass(frozen=True, eq=False)
class Sum(Code):
    """W = parts[0] + parts[1] + ..."""

    parts: tuple[Code, ...]

    def __post_init__(self) -> None:
        if len({part.shape for part in self.parts}) != 1:
            raise PliantError(
                f"a sum needs codes of one shape, not {[p.shape for p in self.parts]}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.parts[0].shape

    def rows(self, index: slice | Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        total = self.parts[0].rows(index)
        for part in self.parts[1:]:
            if isinstance(part, Sparse):
                part.add_rows_(total, index)
            else:
                total += part.rows(index)
        return total.to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        flat: dict[str, Tensor] = {}
        for i, part in enumerate(self.parts):
            flat |= prefixed(f"parts.{i}", part)
        return flat

    def meta(self) -> dict[str, Any]:
        return {"code": self.name, "parts": [part.meta() for part in self.parts]}

    @classmethod
    def build(cls, stored: Stored) -> Sum:
        parts = stored.codes("parts")
        if len({part.shape for part in parts}) != 1:
            raise CorruptError(f"a sum needs codes of one shape, not {[p.shape for p in parts]}")
        return cls(parts)
