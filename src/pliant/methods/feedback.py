"""GPTQ's error feedback for any grid that can name the nearest point of a column."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pliant.codes import GroupLevels
from pliant.errors import PliantError
from pliant.kernels.rounding import BlockKernels, block_kernels
from pliant.methods.levels import LevelGrid
from pliant.methods.quantize.gptq import rows_together, shared_factor
from pliant.observe.statistics import Statistics

# (index uint8 [rows], value [rows]) next to a column [rows] of the group of that number.
Nearest = Callable[[Tensor, int], tuple[Tensor, Tensor]]

_BLOCK = 32


def round_columns(
    columns: Tensor,  # [in, rows], overwritten
    groups: list[int],  # of each column
    factor: Tensor,  # [in, in] upper triangular, of `inverse_factor`
    nearest: Nearest,
) -> Tensor:
    """Indices [in, rows] uint8: a column after the other, each one's error spread on the rest."""
    width = columns.shape[0]
    diagonal = factor.diagonal().tolist()
    chosen = torch.empty(columns.shape, dtype=torch.uint8, device=columns.device)
    errors = torch.empty_like(columns[:_BLOCK])
    for begin in range(0, width, _BLOCK):
        end = min(begin + _BLOCK, width)
        for i in range(begin, end):
            chosen[i], value = nearest(columns[i], groups[i])
            error = torch.sub(columns[i], value, out=errors[i - begin])
            error.div_(diagonal[i])
            if i + 1 < end:
                columns[i + 1 : end].addr_(factor[i, i + 1 : end], error, alpha=-1.0)
        if end < width:
            columns[end:].addmm_(factor[begin:end, end:].t(), errors[: end - begin], alpha=-1.0)
    return chosen


def round_levels(
    weight: Tensor,  # [out, in]
    statistics: Statistics,
    grid: LevelGrid,
    *,
    damp: float,
    act_order: bool,
    place: Tensor | None = None,  # [in], where the grid has each input; None: in order
) -> GroupLevels:
    """The code of `weight` on `grid`, rounded as `gptq` rounds to integers.

    Same factor, order and damping as `gptq`; groups are static. With `place` the code's inputs,
    and so its groups, are in another order than the weight's. Cost: O(out in^2). PliantError
    without a second moment. Source: Frantar et al., GPTQ.
    """
    if statistics.second_moment is None:
        raise PliantError("error feedback needs the second moment of the inputs; observe it first")
    factor, order = shared_factor(statistics, damp=damp, act_order=act_order)
    out, width = weight.shape
    place = torch.arange(width, device=weight.device) if place is None else place
    target = place[order]  # the grid's column that is rounded at each step
    groups = target // grid.group_size
    index = torch.empty(out, width, dtype=torch.uint8, device=weight.device)
    step = rows_together(weight)
    for start in range(0, out, step):
        rows = slice(start, min(start + step, out))
        columns = weight[rows].float().t()[order].contiguous()
        kernels = block_kernels(columns.device)
        if kernels is not None:
            chosen = _round_blocks(kernels, columns, groups, factor, grid, rows)
        else:
            near = grid.columns(rows).nearest
            chosen = round_columns(columns, groups.tolist(), factor, near)
        index[rows, target] = chosen.t()
    return grid.pack(index)


def _round_blocks(
    kernels: BlockKernels, columns: Tensor, groups: Tensor, factor: Tensor, grid: LevelGrid,
    rows: slice,
) -> Tensor:  # fmt: skip
    """As `round_columns`, a block of columns a call."""
    device, width, block = columns.device, columns.shape[0], kernels.BLOCK
    scales = grid.scales[rows].t().contiguous()
    tables = torch.zeros_like(scales, dtype=torch.int32)
    if grid.selector is not None:
        tables = grid.selector[rows].t().to(torch.int32).contiguous()
    levels, factor = grid.tables.contiguous(), factor.contiguous()
    of = groups.to(torch.int32)
    chosen = torch.empty(columns.shape, dtype=torch.uint8, device=device)
    errors = columns.new_empty(block, columns.shape[1])
    for begin in range(0, width, block):
        count = min(block, width - begin)
        end = begin + count
        kernels.round_block_to_levels(
            columns, chosen, errors, scales, tables, levels, of, factor, begin, count
        )
        if end < width:
            columns[end:].addmm_(factor[begin:end, end:].t(), errors[:count], alpha=-1.0)
    return chosen
