"""A trainable matrix of levels as a weight, and its gradients: three launches, nothing kept."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pliant.kernels.streams import launched_on

_BLOCK = 16  # groups of a launch's program


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
def _nearest(x, levels, group, inside, LEVELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The level next to each x [groups, size], of its group's LEVELS rising ones."""
    low = tl.load(levels + group * LEVELS, mask=inside, other=0.0)
    value = tl.zeros_like(x) + low[:, None]
    for k in range(1, LEVELS):
        high = tl.load(levels + group * LEVELS + k, mask=inside, other=0.0)
        value = tl.where(x > ((low + high) / 2)[:, None], high[:, None], value)
        low = high
    return value


@triton.jit  # type: ignore[untyped-decorator]
def _weight(  # type: ignore[no-untyped-def]
    position, stored, levels, weight, count, groups, size, width, unit,
    LEVELS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = group < count
    place = tl.arange(0, SIZE)
    column = (group % groups)[:, None] * size + place[None, :]
    held = inside[:, None] & (place < size)[None, :]
    x = tl.load(position + group[:, None] * size + place[None, :], mask=held, other=0.0)
    scale = tl.load(stored + group, mask=inside, other=0.0) * unit
    value = _nearest(x, levels, group, inside, LEVELS) * scale[:, None]
    there = (group // groups)[:, None] * width + column
    tl.store(weight + there, value, mask=held & (column < width))


@triton.jit  # type: ignore[untyped-decorator]
def _gradients(  # type: ignore[no-untyped-def]
    gradient, position, log_scale, stored, levels, to_position, to_scale,
    count, groups, size, width, unit, reach,
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
    low = tl.load(levels + group * LEVELS, mask=inside, other=0.0) - reach
    high = tl.load(levels + group * LEVELS + LEVELS - 1, mask=inside, other=0.0) + reach
    pulled = (x > low[:, None]) & (x < high[:, None])
    tl.store(to_position + here, tl.where(pulled, given * scale[:, None], 0.0), mask=held)
    value = _nearest(x, levels, group, inside, LEVELS)
    smooth = tl.exp(tl.load(log_scale + group, mask=inside, other=0.0))
    tl.store(to_scale + group, tl.sum(given * value, axis=1) * smooth * unit, mask=inside)


class _LevelsWeight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, position: Tensor, log_scale: Tensor, levels: Tensor,
        unit: float, reach: float, scale_bits: int, width: int,
    ) -> Tensor:  # fmt: skip
        out, groups, size = position.shape
        stored = torch.empty_like(log_scale)
        weight = torch.empty(out, width, device=position.device)
        ctx.sizes = {
            "LEVELS": levels.shape[-1], "SIZE": triton.next_power_of_2(size), "BLOCK": _BLOCK,
        }  # fmt: skip
        ctx.unit, ctx.reach, ctx.width = unit, reach, width
        with launched_on(position.device):
            _scales[(out,)](
                log_scale, stored, groups, float(2**scale_bits - 1), float(2**scale_bits),
                HALF=scale_bits == 16, GROUPS=triton.next_power_of_2(groups),
            )  # fmt: skip
            _weight[(triton.cdiv(out * groups, _BLOCK),)](
                position, stored, levels, weight, out * groups, groups, size, width, unit,
                **ctx.sizes,
            )  # fmt: skip
        ctx.save_for_backward(position, log_scale, stored, levels)
        return weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        position, log_scale, stored, levels = ctx.saved_tensors
        out, groups, size = position.shape
        to_position, to_scale = torch.empty_like(position), torch.empty_like(log_scale)
        with launched_on(position.device):
            _gradients[(triton.cdiv(out * groups, _BLOCK),)](
                gradients[0].contiguous(), position, log_scale, stored, levels,
                to_position, to_scale, out * groups, groups, size, ctx.width, ctx.unit, ctx.reach,
                **ctx.sizes,
            )  # fmt: skip
        return to_position, to_scale, None, None, None, None, None


def levels_weight(
    position: Tensor,  # [out, groups, group_size] float32
    log_scale: Tensor,  # [out, groups] float32
    levels: Tensor,  # [out, groups, levels] float32, rising, in the unit of position
    *,
    unit: float,
    reach: float,
    scale_bits: int,
    width: int,
) -> Tensor:
    """[out, width] float32: the level next to each position, times its scale and unit.

    Scales are those that a code of `scale_bits` stores. Gradients go straight through both
    roundings, and stop for positions further than `reach` beyond the outermost levels.
    """
    found: Tensor = _LevelsWeight.apply(  # type: ignore[no-untyped-call]
        position, log_scale, levels, unit, reach, scale_bits, width
    )
    return found
