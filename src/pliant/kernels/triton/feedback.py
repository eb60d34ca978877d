"""Rounding a block of columns with error feedback: GPTQ's inner loop in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pliant.kernels.streams import launched_on

BLOCK = 256  # columns of a launch
_SUB = 32  # of them held at once
_ROWS = 32  # of a program, which is one warp: what it shares between columns needs no barrier


@triton.jit  # type: ignore[untyped-decorator]
def _part(  # type: ignore[no-untyped-def]
    columns, errors, factor, begin, at, count, rows, width, row, index, SUB: tl.constexpr
):
    """Columns begin + at and after, [SUB, ROWS], less what the launch's earlier errors take."""
    held = (at + index < count)[:, None] & (row < rows)[None, :]
    here = (begin + at + index).to(tl.int64) * rows
    tile = tl.load(columns + here[:, None] + row[None, :], mask=held, other=0.0)
    for before in range(0, at, SUB):
        place = (before + index).to(tl.int64)
        error = tl.load(
            errors + place[:, None] * rows + row[None, :], mask=(row < rows)[None, :], other=0.0
        )
        spread = tl.load(  # [here, before]
            factor + (begin + place)[None, :] * width + (begin + at + index)[:, None],
            mask=(at + index < count)[:, None], other=0.0,
        )  # fmt: skip
        tile -= tl.dot(spread, error, input_precision="ieee")
    return tile


@triton.jit  # type: ignore[untyped-decorator]
def _grid_of(  # type: ignore[no-untyped-def]
    scales, beside, groups, column, count, rows, row
):
    """Scale and zero, or table, [ROWS] of a column's group; of the last one where there is none."""
    group = tl.load(groups + tl.minimum(column, count - 1)).to(tl.int64)
    inside = row < rows
    scale = tl.load(scales + group * rows + row, mask=inside, other=1.0)
    return scale, tl.load(beside + group * rows + row, mask=inside, other=0)


@triton.jit  # type: ignore[untyped-decorator]
def _spread_of(factor, column, first, count, width, index):  # type: ignore[no-untyped-def]
    """The factor's diagonal at a column, and its row at the columns `first` + index behind it."""
    at = tl.minimum(column, count - 1).to(tl.int64)
    behind = (first + index > column) & (first + index < count)
    return (
        tl.load(factor + at * width + at),
        tl.load(factor + at * width + first + index, mask=behind, other=0.0),
    )


@triton.jit  # type: ignore[untyped-decorator]
def _fed(  # type: ignore[no-untyped-def]
    tile, choice, left, diagonal, spread, chosen, errors, begin, column, rows, row
):
    """Store what a column became; the tile with what is left of it fed to the columns after."""
    error = left / diagonal
    here = tl.cast(column, tl.int64) * rows + row
    tl.store(chosen + tl.cast(begin, tl.int64) * rows + here, choice.to(tl.uint8), mask=row < rows)
    tl.store(errors + here, error, mask=row < rows)
    return tile - spread[:, None] * error[None, :]


@triton.jit  # type: ignore[untyped-decorator]
def _nearest(  # type: ignore[no-untyped-def]
    column, scale, beside, levels, top, LEVELS: tl.constexpr
):
    """Index and value next to each of a column [ROWS]: of integers, or of LEVELS levels.

    beside: the group's zero point, or its table.
    """
    if LEVELS == 0:
        # Half rounds up where torch rounds it to even: such ties do not occur in real weights.
        index = tl.floor(column / tl.maximum(scale, 1e-12) + beside + 0.5)
        index = tl.minimum(tl.maximum(index, 0.0), top)
        value = (index - beside) * scale
    else:
        x = column / tl.maximum(scale, 1e-30)
        index = tl.zeros_like(beside)
        here = levels + beside * LEVELS
        level = tl.load(here)
        value = level
        if LEVELS <= 16:  # all are asked for at once
            for k in tl.static_range(1, LEVELS):
                above = tl.load(here + k)
                beyond = x > (level + above) * 0.5
                index += beyond.to(tl.int32)
                value = tl.where(beyond, above, value)
                level = above
        else:
            for k in range(1, LEVELS):
                above = tl.load(here + k)
                beyond = x > (level + above) * 0.5
                index += beyond.to(tl.int32)
                value = tl.where(beyond, above, value)
                level = above
        value *= scale
    return index, value


@triton.jit  # type: ignore[untyped-decorator]
def _feedback(  # type: ignore[no-untyped-def]
    columns, chosen, errors, scales, beside, levels, groups, factor,
    begin, count, rows, width, top,
    LEVELS: tl.constexpr, SUB: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    index = tl.arange(0, SUB)
    for at in range(0, count, SUB):
        tile = _part(columns, errors, factor, begin, at, count, rows, width, row, index, SUB)
        first, end = begin + at, begin + count
        scale, other = _grid_of(scales, beside, groups, first, end, rows, row)
        diagonal, spread = _spread_of(factor, first, first, end, width, index)
        for i in range(tl.minimum(SUB, count - at)):
            # The next column's are asked for before this one's are used.
            after = first + i + 1
            scale_after, other_after = _grid_of(scales, beside, groups, after, end, rows, row)
            diagonal_after, spread_after = _spread_of(factor, after, first, end, width, index)
            column = tl.sum(tl.where((index == i)[:, None], tile, 0.0), axis=0)
            choice, value = _nearest(column, scale, other, levels, top, LEVELS)
            tile = _fed(
                tile, choice, column - value, diagonal, spread,
                chosen, errors, begin, at + i, rows, row,
            )  # fmt: skip
            scale, other, diagonal, spread = scale_after, other_after, diagonal_after, spread_after
        tl.debug_barrier()  # the next columns read these errors


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
    _launch(columns, chosen, errors, scales, zeros, scales, groups, factor, begin, count, top, 0)


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
    _launch(
        columns, chosen, errors, scales, tables, levels, groups, factor, begin, count, 0,
        levels.shape[1],
    )  # fmt: skip


def _launch(
    columns: Tensor, chosen: Tensor, errors: Tensor, scales: Tensor, beside: Tensor,
    levels: Tensor, groups: Tensor, factor: Tensor,
    begin: int, count: int, top: int, number: int,
) -> None:  # fmt: skip
    """number: of levels in a table; 0 for integers, which read no levels."""
    width, rows = columns.shape
    with launched_on(columns.device):
        _feedback[(triton.cdiv(rows, _ROWS),)](
            columns, chosen, errors, scales, beside, levels, groups, factor,
            begin, count, rows, width, float(top),
            LEVELS=number, SUB=_SUB, ROWS=_ROWS, num_warps=1,
        )  # fmt: skip
