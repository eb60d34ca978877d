"""The search for groups' scales in one launch: every candidate of a group in one program.

A program holds a tile of whole groups [GROUPS, SIZE] in registers and tries all candidates on it,
so a matrix is read once however many there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pliant.kernels.streams import launched_on

LONGEST = 1 << 14  # values of a group that a program holds
_TILE = 2048  # values of a program, if a group is not longer
_ANY = ("count", "groups", "tables", "tried")  # numbers that no kernel is compiled anew for
_ROUNDER = tl.constexpr(1.5 * 2.0**23)  # added and taken away, it leaves a float32 an integer


@triton.jit  # type: ignore[untyped-decorator]
def _tile(  # type: ignore[no-untyped-def]
    weight, importance, count, groups, size, width, stride,
    GROUPS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """(values, importance, low, high, group, inside) of a program's groups; 0 beyond their ends.

    low and high [GROUPS] are the least and the largest value of each, 0 beyond the last group.
    """
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    inside = group < count
    place = tl.arange(0, SIZE)
    column = (group % groups)[:, None] * size + place[None, :]
    held = inside[:, None] & (place < size)[None, :] & (column < width)
    here = (group // groups)[:, None] * stride + column
    values = tl.load(weight + here, mask=held, other=0.0).to(tl.float32)
    costs = tl.load(importance + column, mask=held, other=0.0)
    low = tl.min(tl.where(held, values, float("inf")), axis=1)
    high = tl.max(tl.where(held, values, -float("inf")), axis=1)
    low, high = tl.where(inside, low, 0.0), tl.where(inside, high, 0.0)
    return values, costs, low, high, group, inside


@triton.jit  # type: ignore[untyped-decorator]
def _best(  # type: ignore[no-untyped-def]
    values, costs, low, high, levels, tables, shares, tried, smallest, LEVELS: tl.constexpr
):
    """(loss, scale, table), each [GROUPS]: the first of the least loss, tables before shares."""
    best_loss = tl.zeros_like(low) + float("inf")
    best_scale = tl.zeros_like(low)
    best_table = best_scale.to(tl.int32)
    for table in range(tables):
        here = levels + table * LEVELS
        first, last = tl.load(here), tl.load(here + LEVELS - 1)
        # Whole rows of `low` and `high`: `div_rn` takes tensors of one shape.
        up = tl.div_rn(high, tl.zeros_like(high) + last)
        down = tl.div_rn(low, tl.zeros_like(low) + first)
        whole = tl.maximum(tl.maximum(up, down), smallest)
        for share in range(tried):
            scale = whole * tl.load(shares + share)
            x = values * (1.0 / scale)[:, None]
            level = first
            near = tl.zeros_like(x) + level
            for k in range(1, LEVELS):
                above = tl.load(here + k)
                near = tl.where(x > (level + above) * 0.5, above, near)
                level = above
            left = (near - x) * scale[:, None]
            loss = tl.sum(left * left * costs, axis=1)
            better = loss < best_loss
            best_loss = tl.where(better, loss, best_loss)
            best_scale = tl.where(better, scale, best_scale)
            best_table = tl.where(better, table, best_table)
    return best_loss, best_scale, best_table


@triton.jit(do_not_specialize=_ANY)  # type: ignore[untyped-decorator]
def _levels(  # type: ignore[no-untyped-def]
    weight, importance, levels, shares, losses, scales, selector,
    count, groups, size, width, stride, tables, tried, smallest,
    LEVELS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    values, costs, low, high, group, inside = _tile(
        weight, importance, count, groups, size, width, stride, GROUPS, SIZE
    )
    loss, scale, table = _best(
        values, costs, low, high, levels, tables, shares, tried, smallest, LEVELS
    )
    tl.store(losses + group, loss, mask=inside)
    tl.store(scales + group, scale, mask=inside)
    tl.store(selector + group, table.to(tl.int64), mask=inside)


def search_levels(
    weight: Tensor,  # [out, in]
    tables: Tensor,  # [tables, levels] rising, levels on both sides of zero
    importance: Tensor,  # [in], weight of each input's squared error
    group_size: int,
    clips: Sequence[float],
    smallest: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, scale, table), each [out, groups]: the best table and scale of each group.

    Of the scale at which nothing is clipped (at least `smallest`) the shares `clips` are tried.
    group_size at most LONGEST.
    """
    weight, importance, shape, sizes = _prepared(weight, importance, group_size)
    losses, scales = (torch.empty(shape, device=weight.device) for _ in range(2))
    selector = torch.empty(shape, dtype=torch.int64, device=weight.device)
    tables = tables.float().contiguous()
    shares = _floats(tuple(clips), weight.device)
    with launched_on(weight.device):
        _levels[_programs(losses, sizes)](
            weight, importance, tables, shares, losses, scales, selector,
            losses.numel(), shape[1], group_size, weight.shape[1], weight.stride(0),
            len(tables), len(clips), smallest, LEVELS=tables.shape[1], **sizes,
        )  # fmt: skip
    return losses, scales, selector


@triton.jit(do_not_specialize=_ANY)  # type: ignore[untyped-decorator]
def _sums(  # type: ignore[no-untyped-def]
    weight, importance, levels, stored, shares, selector, sums,
    count, groups, size, width, stride, tables, tried, smallest,
    LEVELS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    values, costs, low, high, group, inside = _tile(
        weight, importance, count, groups, size, width, stride, GROUPS, SIZE
    )
    _, scale, table = _best(
        values, costs, low, high, stored, tables, shares, tried, smallest, LEVELS
    )
    scale = tl.minimum(tl.maximum(scale, 2.0**-24), 65504.0).to(tl.float16).to(tl.float32)
    x = values * (1.0 / scale)[:, None]
    costs = costs * (scale * scale)[:, None]
    here = levels + table * LEVELS
    there = sums + group * (2 * LEVELS)
    level = tl.load(here)
    under = tl.zeros_like(scale) - float("inf")
    for k in range(LEVELS):
        above = tl.load(here + k + 1, mask=inside & (k + 1 < LEVELS), other=float("inf"))
        over = (level + above) * 0.5
        cost = tl.where((x > under[:, None]) & (x <= over[:, None]), costs, 0.0)
        tl.store(there + k, tl.sum(cost, axis=1), mask=inside)
        tl.store(there + LEVELS + k, tl.sum(cost * x, axis=1), mask=inside)
        level, under = above, over
    tl.store(selector + group, table.to(tl.int64), mask=inside)


@triton.jit(do_not_specialize=_ANY)  # type: ignore[untyped-decorator]
def _move(  # type: ignore[no-untyped-def]
    levels, stored, selector, sums, count,
    LEVELS: tl.constexpr, BYTES: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """A table's levels to the means of what took them, and what is stored of those."""
    table = tl.program_id(0)
    k = tl.arange(0, LEVELS)
    mass = tl.zeros([LEVELS], tl.float64)
    first = tl.zeros([LEVELS], tl.float64)
    for start in range(0, count, GROUPS):
        group = start + tl.arange(0, GROUPS)
        mine = tl.load(selector + group, mask=group < count, other=-1) == table
        here = sums + group[:, None] * (2 * LEVELS) + k[None, :]
        taken = tl.load(here, mask=mine[:, None], other=0.0)
        summed = tl.load(here + LEVELS, mask=mine[:, None], other=0.0)
        mass += tl.sum(taken.to(tl.float64), axis=0)
        first += tl.sum(summed.to(tl.float64), axis=0)
    there = table * LEVELS + k
    kept = tl.load(levels + there)
    moved = first / tl.where(mass > 0, mass, 1.0)
    moved = tl.sort(tl.where(mass > 0, moved, kept.to(tl.float64)).to(tl.float32))
    # As `byte_scaled` and then `byte_tables` or `stored_tables` of pliant.methods.levels.
    low, far = k < LEVELS // 2, float("inf")
    lower = tl.max(tl.where(low, moved, -far)) - tl.min(tl.where(low, moved, far))
    upper = tl.max(tl.where(low, -far, moved)) - tl.min(tl.where(low, far, moved))
    reach = tl.maximum(tl.max(tl.abs(moved)), tl.maximum(lower, upper) * (127.0 / 126.0))
    moved = moved * (127.0 / 128.0 / tl.maximum(reach, 1e-8))
    if BYTES:
        whole = (moved * 128.0 + _ROUNDER) - _ROUNDER
        whole = tl.where(k == 0, tl.minimum(whole, -1.0), whole)
        whole = tl.where(k == LEVELS - 1, tl.maximum(whole, 1.0), whole)
        tl.store(stored + there, whole * (1.0 / 128.0))
    else:
        tl.store(stored + there, moved.to(tl.float16).to(tl.float32))
    tl.store(levels + there, moved)


def learn_levels(
    weight: Tensor,  # [out, in]
    tables: Tensor,  # [tables, levels] rising
    stored: Tensor,  # [tables, levels], those that groups are fitted to first
    importance: Tensor,  # [in]
    group_size: int,
    clips: Sequence[float],
    smallest: float,
    rounds: int,
    whole: bool,
) -> Tensor:
    """[tables, levels] as they are stored after `rounds` of Lloyd's algorithm, two launches each.

    In each, groups take the table and the scale, rounded to fp16, that `search_levels` finds in
    what is stored; values over their scale the nearest level before it was rounded, which moves
    to their mean, where a value weighs its importance times its squared scale. whole: stored as
    `methods.levels.byte_tables` has them, else as fp16; tables are in the unit of `byte_scaled`.
    """
    weight, importance, shape, sizes = _prepared(weight, importance, group_size)
    count, levels = tables.shape
    tables, stored = (t.to(torch.float32, copy=True).contiguous() for t in (tables, stored))
    selector = torch.empty(shape, dtype=torch.int64, device=weight.device)
    sums = torch.empty(selector.numel(), 2 * levels, device=weight.device)
    shares = _floats(tuple(clips), weight.device)
    together = max(1, 1024 // levels)
    with launched_on(weight.device):
        for _ in range(rounds):
            _sums[_programs(selector, sizes)](
                weight, importance, tables, stored, shares, selector, sums,
                selector.numel(), shape[1], group_size, weight.shape[1], weight.stride(0),
                count, len(clips), smallest, LEVELS=levels, **sizes,
            )  # fmt: skip
            _move[(count,)](
                tables, stored, selector, sums, selector.numel(),
                LEVELS=levels, BYTES=whole, GROUPS=together,
            )  # fmt: skip
    return stored


@triton.jit(do_not_specialize=_ANY)  # type: ignore[untyped-decorator]
def _grid(  # type: ignore[no-untyped-def]
    weight, importance, shares, scales, zeros,
    count, groups, size, width, stride, tried, top, middle,
    SYMMETRIC: tl.constexpr, ONE_BIT: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    values, costs, low, high, group, inside = _tile(
        weight, importance, count, groups, size, width, stride, GROUPS, SIZE
    )
    if SYMMETRIC:
        high = tl.maximum(-low, high)
        low = -high
    else:
        low, high = tl.minimum(low, 0.0), tl.maximum(high, 0.0)
    best_loss = tl.zeros_like(low)
    best_scale, best_zero = tl.zeros_like(low), tl.zeros_like(low)
    for candidate in range(tried):
        share = tl.load(shares + candidate)
        under, over = low * share, high * share
        zero = tl.zeros_like(low) + middle
        if SYMMETRIC:
            if ONE_BIT:
                scale = tl.maximum(over - under, 1e-8)
            else:
                scale = tl.maximum(tl.div_rn(over, tl.zeros_like(low) + (middle - 1.0)), 1e-8)
        else:
            scale = tl.maximum(tl.div_rn(over - under, tl.zeros_like(low) + top), 1e-8)
            zero = tl.minimum(tl.maximum(tl.div_rn(-under, scale), 0.0), top)
            zero = (zero + _ROUNDER) - _ROUNDER
        q = values * (1.0 / scale)[:, None] + zero[:, None]
        q = (tl.minimum(tl.maximum(q, 0.0), top) + _ROUNDER) - _ROUNDER
        left = (q - zero[:, None]) * scale[:, None] - values
        loss = tl.sum(left * left * costs, axis=1)
        better = (loss < best_loss) | (candidate == 0)
        best_loss = tl.where(better, loss, best_loss)
        best_scale = tl.where(better, scale, best_scale)
        best_zero = tl.where(better, zero, best_zero)
    tl.store(scales + group, best_scale, mask=inside)
    tl.store(zeros + group, best_zero, mask=inside)


def search_grid(
    weight: Tensor,  # [out, in]
    bits: int,
    symmetric: bool,
    importance: Tensor,  # [in], weight of each input's squared error
    group_size: int,
    clips: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """(scale, zero), each [out, groups] float32: of the shares `clips` of a group's range the best.

    Integers 0 to 2**bits - 1 for a range that holds zero, or for one about it if `symmetric`,
    whose zero is 2**(bits - 1), and 1/2 at one bit. group_size at most LONGEST.
    """
    weight, importance, shape, sizes = _prepared(weight, importance, group_size)
    scales, zeros = (torch.empty(shape, device=weight.device) for _ in range(2))
    shares = _floats(tuple(clips), weight.device)
    middle = 0.5 if bits == 1 else float(1 << (bits - 1))
    with launched_on(weight.device):
        # No product and sum become one operation: a scale is the one that torch finds.
        _grid[_programs(scales, sizes)](
            weight, importance, shares, scales, zeros,
            scales.numel(), shape[1], group_size, weight.shape[1], weight.stride(0),
            len(clips), float((1 << bits) - 1), middle,
            SYMMETRIC=symmetric, ONE_BIT=bits == 1, enable_fp_fusion=False, **sizes,
        )  # fmt: skip
    return scales, zeros


def _prepared(
    weight: Tensor, importance: Tensor, group_size: int
) -> tuple[Tensor, Tensor, tuple[int, int], dict[str, Any]]:
    """(weight with rows in one piece, importance, [out, groups], constants of a launch)."""
    out, width = weight.shape
    if importance.shape != (width,) or not 1 <= group_size <= LONGEST:
        raise ValueError(f"importance must be [in] and groups of 1 to {LONGEST}")
    weight = weight.detach()
    if weight.stride(1) != 1 or weight.dtype == torch.float64:
        weight = weight.float().contiguous()
    size = max(16, triton.next_power_of_2(group_size))
    groups = max(1, _TILE // size)
    sizes = {"GROUPS": groups, "SIZE": size, "num_warps": min(16, max(4, groups * size // 512))}
    importance = importance.to(weight.device).float().contiguous()
    return weight, importance, (out, -(-width // group_size)), sizes


def _programs(found: Tensor, sizes: dict[str, Any]) -> tuple[int]:
    return (max(1, triton.cdiv(found.numel(), sizes["GROUPS"])),)


@lru_cache(maxsize=64)
def _floats(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Kept: copying to a GPU waits for all that it has yet to do."""
    return torch.tensor(values, dtype=torch.float32, device=device)
