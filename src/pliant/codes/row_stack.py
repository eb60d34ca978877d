"""RowStack: one matrix in slices of rows, each its own code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pliant.codes.base import Code, Stored, form, prefixed
from pliant.errors import CorruptError, PliantError


@form("row_stack")
@dataclass(frozen=True, eq=False)
class RowStack(Code):
    """W = [parts[0]; parts[1]; ...], stacked along the output axis."""

    parts: tuple[Code, ...]

    def __post_init__(self) -> None:
        if len({part.shape[1] for part in self.parts}) != 1:
            raise PliantError(f"a stack needs one width, not {[p.shape for p in self.parts]}")

    @property
    def shape(self) -> tuple[int, int]:
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

    def starts(self) -> list[int]:
        """The first row of each part."""
        starts = [0]
        for part in self.parts[:-1]:
            starts.append(starts[-1] + part.shape[0])
        return starts

    def rows(self, index: slice | Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        out, width = self.shape
        if isinstance(index, slice) and index.step in (None, 1):
            first, last, _ = index.indices(out)
            slices = [
                (part, max(first - start, 0), min(last - start, part.shape[0]))
                for part, start in zip(self.parts, self.starts(), strict=True)
            ]
            pieces = [part.rows(slice(a, b), dtype) for part, a, b in slices if a < b]
            if len(pieces) == 1:
                return pieces[0]
            empty = torch.empty(0, width, dtype=dtype, device=self.device)
            return torch.cat(pieces) if pieces else empty
        wanted = torch.arange(out, device=self.device)[index]
        if wanted.is_cuda and torch.cuda.is_current_stream_capturing():
            return self._rows_of_all(wanted, dtype)
        decoded = torch.empty(len(wanted), width, dtype=dtype, device=self.device)
        for part, start in zip(self.parts, self.starts(), strict=True):
            inside = (wanted >= start) & (wanted < start + part.shape[0])
            position = inside.nonzero()[:, 0]
            if position.numel():
                decoded[position] = part.rows(wanted[position] - start, dtype)
        return decoded

    def _rows_of_all(self, wanted: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows [n], read from every part: in a CUDA graph nothing may wait for their places."""
        decoded = torch.zeros(len(wanted), self.shape[1], dtype=dtype, device=self.device)
        for part, start in zip(self.parts, self.starts(), strict=True):
            inside = (wanted >= start) & (wanted < start + part.shape[0])
            found = part.rows((wanted - start).clamp(0, part.shape[0] - 1), dtype)
            decoded = torch.where(inside[:, None], found, decoded)
        return decoded

    def tensors(self) -> dict[str, Tensor]:
        flat: dict[str, Tensor] = {}
        for i, part in enumerate(self.parts):
            flat |= prefixed(f"parts.{i}", part)
        return flat

    def meta(self) -> dict[str, Any]:
        return {"code": self.name, "parts": [part.meta() for part in self.parts]}

    @classmethod
    def build(cls, stored: Stored) -> RowStack:
        parts = stored.codes("parts")
        if len({part.shape[1] for part in parts}) != 1:
            raise CorruptError(f"a stack needs one width, not {[p.shape for p in parts]}")
        return cls(parts)
