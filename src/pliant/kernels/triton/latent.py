"""A trainable matrix as a weight, and its gradients: two launches each, nothing kept between."""

from __future__ import annotations

from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from pliant.kernels.streams import launched_on

_WEIGHTS = 4096  # of a launch's program, at most, unless one group has more


@triton.jit  # type: ignore[untyped-decorator]
def _scales(  # type: ignore[no-untyped-def]
    log_scale, stored, groups, top, steps, HALF: tl.constexpr, GROUPS: tl.constexpr
):
    """One row's scales as its code will hold them."""
    index = tl.arange(0, GROUPS)
    here = tl.program_id(0).to(tl.int64) * groups + index
    scale = tl.exp(tl.load(log_scale + here, mask=index < groups, other=-1e30))
    if HALF:
        scale = scale.to(tl.float16).to(tl.float32)
    else:
        largest = tl.max(scale, axis=0) * (steps / top)
        unit = largest.to(tl.float16).to(tl.float32) / steps
        scale = tl.minimum(tl.maximum(tl.floor(scale / unit + 0.5), 1.0), top) * unit
    tl.store(stored + here, scale, mask=index < groups)


@triton.jit  # type: ignore[untyped-decorator]
def _nearest(x, points, group, inside, top, LEVELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """What is next to each x [groups, size]: of its group's LEVELS rising ones, or an integer.

    With no LEVELS a point is the zero that integers up to top are counted from.
    """
    if LEVELS == 0:
        zero = tl.load(points + group, mask=inside, other=0.0)
        return tl.minimum(tl.maximum(tl.floor(x + 0.5), 0.0), top) - zero[:, None]
    low = tl.load(points + group * LEVELS, mask=inside, other=0.0)
    value = tl.zeros_like(x) + low[:, None]
    for k in range(1, LEVELS):
        high = tl.load(points + group * LEVELS + k, mask=inside, other=0.0)
        value = tl.where(x > ((low + high) / 2)[:, None], high[:, None], value)
        low = high
    return value


@triton.jit  # type: ignore[untyped-decorator]
def _weight(  # type: ignore[no-untyped-def]
    position, stored, points, weight, count, groups, size, width, top, unit,
    LEVELS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = group < count
    place = tl.arange(0, SIZE)
    column = (group % groups)[:, None] * size + place[None, :]
    held = inside[:, None] & (place < size)[None, :]
    x = tl.load(position + group[:, None] * size + place[None, :], mask=held, other=0.0)
    scale = tl.load(stored + group, mask=inside, other=0.0) * unit
    value = _nearest(x, points, group, inside, top, LEVELS) * scale[:, None]
    there = (group // groups)[:, None] * width + column
    tl.store(weight + there, value, mask=held & (column < width))


@triton.jit  # type: ignore[untyped-decorator]
def _gradients(  # type: ignore[no-untyped-def]
    gradient, position, log_scale, stored, points, to_position, to_scale,
    count, groups, size, width, top, unit, reach,
    LEVELS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = group < count
    place = tl.arange(0, SIZE)
    column = (group % groups)[:, None] * size + place[None, :]
    held = inside[:, None] & (place < size)[None, :]
    here = group[:, None] * size + place[None, :]
    x = tl.load(position + here, mask=held, other=0.0)
    there = (group // groups)[:, None] * width + column
    given = tl.load(gradient + there, mask=held & (column < width), other=0.0).to(tl.float32)
    scale = tl.load(stored + group, mask=inside, other=0.0) * unit
    if LEVELS == 0:
        pulled = (x > -reach) & (x < top + reach)
    else:
        low = tl.load(points + group * LEVELS, mask=inside, other=0.0) - reach
        high = tl.load(points + group * LEVELS + LEVELS - 1, mask=inside, other=0.0) + reach
        pulled = (x > low[:, None]) & (x < high[:, None])
    tl.store(to_position + here, tl.where(pulled, given * scale[:, None], 0.0), mask=held)
    value = _nearest(x, points, group, inside, top, LEVELS)
    smooth = tl.exp(tl.load(log_scale + group, mask=inside, other=0.0))
    tl.store(to_scale + group, tl.sum(given * value, axis=1) * smooth * unit, mask=inside)


class Grid(Protocol):
    """As `pliant.methods.latent.Grid`."""

    @property
    def points(self) -> Tensor: ...
    @property
    def reach(self) -> float: ...
    @property
    def top(self) -> int: ...
    @property
    def unit(self) -> float: ...


def write_weight(
    position: Tensor,  # [out, groups, group_size] float32
    log_scale: Tensor,  # [out, groups] float32
    weight: Tensor,  # [out, in], written: contiguous, of any float type
    grid: Grid,
    scale_bits: int,
) -> None:
    """The point next to each position, times its scale and unit.

    Scales are those that a code of `scale_bits` stores.
    """
    stored = _stored(log_scale, scale_bits)
    count, tile = log_scale.numel(), _tile(position, grid)
    with launched_on(position.device):
        _weight[(triton.cdiv(count, tile["BLOCK"]),)](
            position, stored, grid.points, weight, count, *position.shape[1:], weight.shape[1],
            float(grid.top), grid.unit, **tile,
        )  # fmt: skip


def gradients(
    position: Tensor,  # [out, groups, group_size] float32
    log_scale: Tensor,  # [out, groups] float32
    gradient: Tensor,  # [out, in] of the weight, of any float type
    grid: Grid,
    scale_bits: int,
) -> tuple[Tensor, Tensor]:
    """Those of position and log_scale: straight through both roundings.

    None reaches positions further than the grid's reach beyond its outermost points.
    """
    stored, gradient = _stored(log_scale, scale_bits), gradient.contiguous()
    to_position, to_scale = torch.empty_like(position), torch.empty_like(log_scale)
    count, tile = log_scale.numel(), _tile(position, grid)
    with launched_on(position.device):
        _gradients[(triton.cdiv(count, tile["BLOCK"]),)](
            gradient, position, log_scale, stored, grid.points, to_position, to_scale,
            count, *position.shape[1:], gradient.shape[1],
            float(grid.top), grid.unit, grid.reach, **tile,
        )  # fmt: skip
    return to_position, to_scale


def _stored(log_scale: Tensor, bits: int) -> Tensor:
    """[out, groups]: the scales as their code will hold them."""
    out, groups = log_scale.shape
    stored = torch.empty_like(log_scale)
    with launched_on(log_scale.device):
        _scales[(out,)](
            log_scale, stored, groups, float(2**bits - 1), float(2**bits),
            HALF=bits == 16, GROUPS=triton.next_power_of_2(groups),
        )  # fmt: skip
    return stored


def _tile(position: Tensor, grid: Grid) -> dict[str, int]:
    size = triton.next_power_of_2(position.shape[2])
    levels = 0 if grid.top else grid.points.shape[-1]
    return {"LEVELS": levels, "SIZE": size, "BLOCK": max(1, min(16, _WEIGHTS // size))}
