"""GPTQ: round one input channel at a time and let the others make up for its error."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from pliant.codes import GroupInt
from pliant.errors import PliantError
from pliant.kernels.rounding import BlockKernels, block_kernels
from pliant.methods.catalog import method
from pliant.methods.grid import Grid, fit_grid
from pliant.observe import Statistics

_BLOCK = 32
_TILE_BYTES = 16 << 20  # of columns that are rounded together
_GPU_TILE_BYTES = 64 << 20


@dataclass(frozen=True)
class _Begun:
    """A factor that a GPU may still be at. failed: in main memory once `done` was reached."""

    factor: Tensor
    order: Tensor
    failed: Tensor
    done: torch.cuda.Event | None


# Rungs of one target share their statistics, and so the factor, which costs O(in^3).
_FACTORS: WeakKeyDictionary[Statistics, dict[tuple[float, bool], tuple[Tensor, Tensor] | _Begun]]
_FACTORS = WeakKeyDictionary()


@method(
    "gptq",
    kind="quantize",
    paper="GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
    needs=("second_moment",),
)
def gptq(
    weight: Tensor,  # [out, in]
    statistics: Statistics,
    *,
    bits: int = 4,
    group_size: int = 64,
    symmetric: bool = False,
    act_order: bool = True,
    damp: float = 0.1,
    clip: bool = True,
    scale_bits: int = 16,
) -> GroupInt:
    """Integers that minimise |(W - Q) X|^2 given the second moment H = X X^T of the inputs.

    Columns are rounded in order of falling H_ii (`act_order`); each one's error is spread over
    the columns still to come through the Cholesky factor of the damped inverse of H. Groups are
    fixed on the original weight ("static groups"), so no permutation is stored. `damp` is a
    share of H's mean diagonal. `clip` searches each group's range for the least H-weighted
    error. Cost: O(in^3) once and O(out in^2) a bit width. Source: Frantar et al.
    """
    if statistics.second_moment is None:
        raise PliantError("gptq needs the second moment of its inputs; observe it first")
    moment = statistics.second_moment
    grid = fit_grid(
        weight,
        bits,
        group_size,
        symmetric=symmetric,
        importance=moment.diagonal() if clip else None,
        clip=clip,
        scale_bits=scale_bits,
    )
    factor, order = shared_factor(statistics, damp=damp, act_order=act_order)
    return grid.pack(round_with_feedback(weight, grid, factor, order))


def shared_factor(statistics: Statistics, *, damp: float, act_order: bool) -> tuple[Tensor, Tensor]:
    """`inverse_factor` of the second moment, kept until these statistics go or ask for another."""
    assert statistics.second_moment is not None
    kept = _FACTORS.setdefault(statistics, {})
    found = kept.get((damp, act_order))
    if isinstance(found, _Begun):
        if found.done is not None:
            found.done.synchronize()
        found = None if int(found.failed) else (found.factor, found.order)
    if found is None:
        kept.clear()
        found = inverse_factor(statistics.second_moment, damp=damp, act_order=act_order)
    kept[damp, act_order] = found
    return found


def begin_factor(statistics: Statistics, *, damp: float, act_order: bool) -> None:
    """Have the device start what `shared_factor` will give, and wait for nothing.

    Whether it worked is known once the device is done; asked for only then, a GPU need not first
    do all that it was given in between.
    """
    assert statistics.second_moment is not None
    kept = _FACTORS.setdefault(statistics, {})
    if (damp, act_order) in kept:
        return
    order = _order(statistics.second_moment, act_order)
    factor, failed = _factored(statistics.second_moment, order, damp)
    done = None
    if failed.is_cuda:
        told = torch.empty((), dtype=failed.dtype, pin_memory=True)
        failed = told.copy_(failed, non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
    kept.clear()
    kept[damp, act_order] = _Begun(factor, order, failed, done)


def inverse_factor(
    moment: Tensor, *, damp: float = 0.01, act_order: bool = True
) -> tuple[Tensor, Tensor]:
    """(U, order): U is upper triangular with U^T U = (H + damping)^-1, H in `order`. [in, in], [in]

    Channels that never fired get a unit diagonal. The damping grows tenfold, up to five times,
    while H is not positive definite. PliantError when it never becomes so.
    """
    order = _order(moment, act_order)
    for attempt in range(6):
        factor, failed = _factored(moment, order, damp * 10**attempt)
        if not int(failed):
            return factor, order
    raise PliantError("the inputs' second moment is not positive definite; use more text")


def _order(moment: Tensor, act_order: bool) -> Tensor:
    """[in], the channels as they are rounded: those that matter most first, if `act_order`."""
    if act_order:
        return torch.argsort(moment.diagonal(), descending=True, stable=True)
    return torch.arange(len(moment), device=moment.device)


def _factored(moment: Tensor, order: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """(U, failed) for `inverse_factor`: int32 [], not 0 where U is of no use."""
    h = moment[order[:, None], order].float().t()  # by columns: factored in place, h is large
    diagonal = moment.diagonal()[order].float()
    diagonal = torch.where(diagonal <= 0, 1.0, diagonal)
    h.diagonal().copy_(diagonal + diagonal.mean() * damp)
    first, second = torch.zeros(2, dtype=torch.int32, device=moment.device)
    torch.linalg.cholesky_ex(h, out=(h, first))
    if not h.is_cuda and int(first):  # a CPU's inverse refuses what is no factor
        return h, first
    torch.cholesky_inverse(h, out=h)
    torch.linalg.cholesky_ex(h, out=(h, second))
    return h.t(), first | second  # its transpose by columns is the upper factor by rows: no copy


def round_with_feedback(weight: Tensor, grid: Grid, factor: Tensor, order: Tensor) -> Tensor:
    """Integers [out, in] uint8 of `weight` on `grid`, errors fed forward in `order`."""
    out, width = weight.shape
    integers = torch.empty(out, width, dtype=torch.uint8, device=weight.device)
    tile = rows_together(weight)
    for start in range(0, out, tile):
        rows = slice(start, min(start + tile, out))
        columns = weight[rows].float().t()[order].contiguous()  # [in, tile]
        chosen = _round_tile(columns, grid, rows, factor, order)
        integers[rows] = chosen[torch.argsort(order)].t()
    return integers


def rows_together(weight: Tensor) -> int:
    """Rows of `weight` [out, in] that are rounded together, as float32 columns."""
    return max(64, (_GPU_TILE_BYTES if weight.is_cuda else _TILE_BYTES) // (4 * weight.shape[1]))


def _round_tile(columns: Tensor, grid: Grid, rows: slice, factor: Tensor, order: Tensor) -> Tensor:
    """Round `columns` [in, rows] (overwritten) in order; returns the integers [in, rows] uint8."""
    width = columns.shape[0]
    size = width if grid.group_size <= 0 else grid.group_size
    scales = grid.scales[rows].t().contiguous()  # [groups, rows]
    zeros = grid.zeros[rows].t().contiguous()
    kernels = block_kernels(columns.device)
    if kernels is not None:
        return _round_blocks(kernels, columns, scales, zeros, order // size, factor, grid.top)
    inverses = 1.0 / scales.clamp_min(1e-12)
    group = (order // size).tolist()
    diagonal = factor.diagonal().tolist()
    chosen = torch.empty(columns.shape, dtype=torch.uint8, device=columns.device)
    errors = torch.empty_like(columns[:_BLOCK])
    for begin in range(0, width, _BLOCK):
        end = min(begin + _BLOCK, width)
        for i in range(begin, end):
            g = group[i]
            column = columns[i]
            q = torch.addcmul(zeros[g], column, inverses[g]).round_().clamp_(0, grid.top)
            chosen[i] = q
            error = torch.sub(column, q.sub_(zeros[g]).mul_(scales[g]), out=errors[i - begin])
            error.div_(diagonal[i])
            if i + 1 < end:
                columns[i + 1 : end].addr_(factor[i, i + 1 : end], error, alpha=-1.0)
        if end < width:
            columns[end:].addmm_(factor[begin:end, end:].t(), errors[: end - begin], alpha=-1.0)
    return chosen


def _round_blocks(
    kernels: BlockKernels, columns: Tensor, scales: Tensor, zeros: Tensor, group: Tensor,
    factor: Tensor, top: int,
) -> Tensor:  # fmt: skip
    """As `_round_tile`, a block of columns a call instead of some 150."""
    width, block = columns.shape[0], kernels.BLOCK
    factor, group = factor.contiguous(), group.to(torch.int32)
    chosen = torch.empty(columns.shape, dtype=torch.uint8, device=columns.device)
    errors = columns.new_empty(block, columns.shape[1])
    for begin in range(0, width, block):
        count = min(block, width - begin)
        end = begin + count
        kernels.round_block(
            columns, chosen, errors, scales, zeros, group, factor, begin, count, top
        )
        if end < width:
            columns[end:].addmm_(factor[begin:end, end:].t(), errors[:count], alpha=-1.0)
    return chosen
