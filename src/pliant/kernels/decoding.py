"""Whole matrices from codes, for what reads weights and does not multiply with them."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from pliant.codes import (
    BlockRotated,
    Code,
    Codebook,
    ColumnStack,
    GroupInt,
    GroupLevels,
    Permuted,
    Rotated,
    Scaled,
    Signed,
    Sparse,
    Sum,
    Ternary,
)

_WHOLE = slice(None)


def decode(code: Code, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix [out, in], as `code.decode` gives it; group codes on a GPU in one launch."""
    if isinstance(code, GroupInt | GroupLevels) and code.device.type == "cuda" and has_triton():
        return launched(code, dtype)
    return code.decode(dtype)


def launched(code: Code, dtype: torch.dtype = torch.float32, rows: slice = _WHOLE) -> Tensor:
    """Those rows (of step 1) of the matrix, [rows, in], by Triton's kernels."""
    from pliant.kernels.triton import group, rotate

    if isinstance(code, GroupInt | GroupLevels | Codebook | Ternary):
        return group.decode(code, dtype, rows)
    if isinstance(code, Permuted):
        inverse = torch.argsort(code.order.to(torch.int64))
        return launched(code.inner, dtype, rows).index_select(1, inverse)
    if isinstance(code, ColumnStack):
        return torch.cat([launched(part, dtype, rows) for part in code.parts], 1)
    if isinstance(code, Rotated):
        inner = launched(code.inner, rows=rows)
        return rotate.rotate(inner, code.seed, dtype, inverse=True)
    if isinstance(code, BlockRotated):
        inner = launched(code.inner, rows=rows)
        return rotate.turn(inner, code.blocks.mT, code.tail.t(), dtype)
    if isinstance(code, Signed):
        signs = group.decode(group.signs(code), torch.float32, rows)
        return signs.mul_(launched(code.inner, rows=rows)).to(dtype)
    if isinstance(code, Scaled):
        values = launched(code.inner, rows=rows)
        if code.out_scale is not None:
            values = values * code.out_scale[rows].float()[:, None]
        if code.in_scale is not None:
            values = values * code.in_scale.float()
        return values.to(dtype)
    if isinstance(code, Sum):
        total = launched(code.parts[0], rows=rows)
        for part in code.parts[1:]:
            if isinstance(part, Sparse):
                part.add_rows_(total, rows)
            else:
                total += launched(part, rows=rows)
        return total.to(dtype)
    return code.rows(rows, dtype)


@cache
def has_triton() -> bool:
    return find_spec("triton") is not None
