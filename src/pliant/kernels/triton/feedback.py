"""Rounding a block of columns with error feedback: GPTQ's inner loop in one launch."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 32  # columns of a launch
_ROWS = 64


@triton.jit  # type: ignore[untyped-decorator]
def _tile(columns, begin, count, rows, row, index):  # type: ignore[no-untyped-def]
    """The block's columns of a program's rows, [BLOCK, ROWS]."""
    here = (begin + index).to(tl.int64) * rows
    held = (index < count)[:, None] & (row < rows)[None, :]
    return tl.load(columns + here[:, None] + row[None, :], mask=held, other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _fed(  # type: ignore[no-untyped-def]
    tile, choice, left, chosen, errors, factor, begin, i, count, rows, width, row, index
):
    """Store what column i became; the tile with what is left of it fed to the columns after."""
    at = (begin + i).to(tl.int64)
    error = left / tl.load(factor + at * width + at)
    tl.store(chosen + at * rows + row, choice.to(tl.uint8), mask=row < rows)
    tl.store(errors + i * rows + row, error, mask=row < rows)
    spread = tl.load(
        factor + at * width + begin + index, mask=(index > i) & (index < count), other=0.0
    )
    return tile - spread[:, None] * error[None, :]


@triton.jit  # type: ignore[untyped-decorator]
def _feedback(  # type: ignore[no-untyped-def]
    columns, chosen, errors, scales, zeros, groups, factor,
    begin, count, rows, width, top,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    index = tl.arange(0, BLOCK)
    tile = _tile(columns, begin, count, rows, row, index)
    for i in range(count):
        column = tl.sum(tl.where((index == i)[:, None], tile, 0.0), axis=0)
        group = tl.load(groups + begin + i).to(tl.int64)
        scale = tl.load(scales + group * rows + row, mask=inside, other=1.0)
        zero = tl.load(zeros + group * rows + row, mask=inside, other=0.0)
        # Half rounds up where torch rounds it to even: such ties do not occur in real weights.
        q = tl.floor(column / tl.maximum(scale, 1e-12) + zero + 0.5)
        q = tl.minimum(tl.maximum(q, 0.0), top)
        tile = _fed(
            tile, q, column - (q - zero) * scale,
            chosen, errors, factor, begin, i, count, rows, width, row, index,
        )  # fmt: skip


def round_block(
    columns: Tensor,  # [in, rows] float32, read
    chosen: Tensor,  # [in, rows] uint8, its rows begin:begin + count are written
    errors: Tensor,  # [BLOCK, rows] float32, its first `count` rows are written
    scales: Tensor,  # [groups, rows] float32
    zeros: Tensor,  # [groups, rows] float32
    groups: Tensor,  # [in] int32, the group of each column
    factor: Tensor,  # [in, in] upper triangular float32
    begin: int,
    count: int,
    top: int,
) -> None:
    """Round columns begin to begin + count in order, each one's error fed to those after it.

    errors gets what is left to feed to columns beyond the block, divided by factor's diagonal.
    All tensors contiguous, on one GPU.
    """
    width, rows = columns.shape
    grid = (triton.cdiv(rows, _ROWS),)
    with torch.cuda.device(columns.device) if columns.is_cuda else nullcontext():
        _feedback[grid](
            columns, chosen, errors, scales, zeros, groups, factor,
            begin, count, rows, width, float(top), BLOCK=BLOCK, ROWS=_ROWS,
        )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _level_feedback(  # type: ignore[no-untyped-def]
    columns, chosen, errors, scales, tables, middles, levels, groups, factor,
    begin, count, rows, width,
    LEVELS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    index = tl.arange(0, BLOCK)
    tile = _tile(columns, begin, count, rows, row, index)
    for i in range(count):
        column = tl.sum(tl.where((index == i)[:, None], tile, 0.0), axis=0)
        group = tl.load(groups + begin + i).to(tl.int64)
        scale = tl.load(scales + group * rows + row, mask=inside, other=1.0)
        table = tl.load(tables + group * rows + row, mask=inside, other=0)
        x = column / tl.maximum(scale, 1e-30)
        place = tl.zeros_like(table)
        for k in range(LEVELS - 1):
            place += (x > tl.load(middles + table * (LEVELS - 1) + k)).to(tl.int32)
        value = tl.load(levels + table * LEVELS + place) * scale
        tile = _fed(
            tile, place, column - value,
            chosen, errors, factor, begin, i, count, rows, width, row, index,
        )  # fmt: skip


def round_block_to_levels(
    columns: Tensor,  # [in, rows] float32, read
    chosen: Tensor,  # [in, rows] uint8, its rows begin:begin + count are written
    errors: Tensor,  # [BLOCK, rows] float32, its first `count` rows are written
    scales: Tensor,  # [groups, rows] float32
    tables: Tensor,  # [groups, rows] int32, the table of each group
    levels: Tensor,  # [tables, levels] float32, rising
    groups: Tensor,  # [in] int32, the group of each column
    factor: Tensor,  # [in, in] upper triangular float32
    begin: int,
    count: int,
) -> None:
    """`round_block` to the nearest of a table's levels times the group's scale."""
    width, rows = columns.shape
    middles = ((levels[:, 1:] + levels[:, :-1]) / 2).contiguous()
    with torch.cuda.device(columns.device) if columns.is_cuda else nullcontext():
        _level_feedback[(triton.cdiv(rows, _ROWS),)](
            columns, chosen, errors, scales, tables, middles, levels, groups, factor,
            begin, count, rows, width, LEVELS=levels.shape[1], BLOCK=BLOCK, ROWS=_ROWS,
        )  # fmt: skip
