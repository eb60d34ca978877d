"""Sparse: a few values kept apart, in fp16, each with a compact position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pliant.codes.base import Code, Stored, form, row_count
from pliant.codes.indices import check_range, compact, index_type
from pliant.errors import CorruptError, PliantError


@form("sparse")
@dataclass(frozen=True, eq=False)
class Sparse(Code):
    """Values ordered by row then column, everything else zero.

    `place` says which row each value is in, by whichever is smaller: the number of values of
    each row [out] (layout "counts"), or the row of each value [nnz] (layout "rows").
    """

    values: Tensor  # fp16 [nnz]
    columns: Tensor  # [nnz], uint8, uint16 or int32
    place: Tensor
    layout: str
    shape_: tuple[int, int]

    @classmethod
    def from_dense(cls, matrix: Tensor, mask: Tensor | None = None) -> Sparse:
        """Keep `matrix` [out, in] where `mask` is true (by default where it is not zero)."""
        mask = matrix != 0 if mask is None else mask
        row, column = mask.nonzero(as_tuple=True)
        return cls.from_coordinates(row, column, matrix[mask], (matrix.shape[0], matrix.shape[1]))

    @classmethod
    def from_coordinates(
        cls, row: Tensor, column: Tensor, values: Tensor, shape: tuple[int, int]
    ) -> Sparse:
        """Entries at distinct (row, column), in any order."""
        out, width = shape
        flat, order = (row.to(torch.int64) * width + column.to(torch.int64)).sort()
        if flat.numel() and bool((flat[1:] == flat[:-1]).any()):
            raise PliantError("a sparse code cannot hold two values at one position")
        row, column, values = row[order], column[order], values[order]
        counts = torch.bincount(row, minlength=out)
        counts = compact(counts, int(counts.max()) + 1 if out else 1)
        rows = compact(row, out)
        by_count = counts.nbytes <= rows.nbytes
        place, layout = (counts, "counts") if by_count else (rows, "rows")
        half = values.float().clamp(-65504, 65504).half()
        return cls(half, compact(column, width), place, layout, (out, width))

    @property
    def shape(self) -> tuple[int, int]:
        return self.shape_

    def coordinates(self) -> tuple[Tensor, Tensor]:
        """(row, column) of each value, int64 [nnz]."""
        place = self.place.to(torch.int64)
        if self.layout == "counts":
            every = torch.arange(self.shape[0], device=self.device)
            place = torch.repeat_interleave(every, place, output_size=self.values.numel())
        return place, self.columns.to(torch.int64)

    def rows(self, index: slice | Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        count = row_count(index, self.shape[0])
        zeros = torch.zeros(count, self.shape[1], dtype=dtype, device=self.device)
        return self.add_rows_(zeros, index)

    def add_rows_(self, target: Tensor, index: slice | Tensor) -> Tensor:
        """target [n, in] += the rows of `index`, in place."""
        row, column = self.coordinates()
        values = self.values
        if isinstance(index, slice) and index.step in (None, 1):
            start, stop, _ = index.indices(self.shape[0])
            low, high = torch.searchsorted(row, row.new_tensor([start, stop])).tolist()
            row, column, values = row[low:high] - start, column[low:high], values[low:high]
        else:
            every = torch.arange(self.shape[0], device=self.device)
            wanted = every[index]
            # Gather by requested row: a row may be asked for more than once.
            bounds = torch.searchsorted(row, torch.stack([wanted, wanted + 1]))
            lengths = bounds[1] - bounds[0]
            row = torch.repeat_interleave(torch.arange(len(wanted), device=row.device), lengths)
            within = torch.arange(len(row), device=row.device)
            within -= torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
            picked = within + bounds[0][row]
            column, values = column[picked], values[picked]
        return target.index_put_((row, column), values.to(target.dtype), accumulate=True)

    def tensors(self) -> dict[str, Tensor]:
        return {"values": self.values, "columns": self.columns, self.layout: self.place}

    def meta(self) -> dict[str, Any]:
        return {
            "code": self.name,
            "shape": list(self.shape),
            "values": self.values.numel(),
            "layout": self.layout,
        }

    @classmethod
    def build(cls, stored: Stored) -> Sparse:
        out, width = stored.shape()
        count = stored.integer("values", 0, out * width)
        layout = stored.choice("layout", {"counts": "counts", "rows": "rows"})
        values = stored.tensor("values", (count,), torch.float16)
        columns = stored.tensor("columns", (count,), index_type(width))
        check_range(columns, width, "columns")
        if layout == "rows":
            place = stored.tensor("rows", (count,), index_type(out))
            check_range(place, out, "rows")
            if bool((place.to(torch.int64).diff() < 0).any()):
                raise CorruptError("the rows of a sparse code must rise")
        else:
            place = stored.tensor("counts", (out,), torch.uint8, torch.uint16, torch.int32)
            check_range(place, width + 1, "counts")
            if int(place.to(torch.int64).sum()) != count:
                raise CorruptError(f"the row counts of a sparse code must add up to {count}")
        return cls(values, columns, place, layout, (out, width))
