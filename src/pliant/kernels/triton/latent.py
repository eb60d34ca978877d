"""Many trainable matrices at once: their weights, and a step of Adam, in a launch a form.

What a launch needs to know of each matrix is in a table on the GPU, so that the hundreds of a model
cost no more launches than a few. Large ones are several entries of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from pliant.kernels.streams import launched_on

_WEIGHTS = 1024  # that a program holds at a time, unless one group has more
_ROWS = 1024  # of an entry, at most; a multiple of 8
_PROGRAMS = 128  # of an entry
_NUMBERS = tl.constexpr(11)  # of an entry: eight addresses, rows, groups, width
_REALS = tl.constexpr(7)
_WIDTHS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


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


class Trainable(Protocol):
    """As `pliant.methods.latent.Latent`; all of it float32 and contiguous."""

    position: Tensor  # [out, groups, group_size]
    log_scale: Tensor  # [out, groups]
    moments: tuple[Tensor, ...]
    scale_bits: int

    def grid(self) -> Grid: ...


Rates = tuple[float, float, float]
"""Of a step of Adam: `pliant.fit.descent.corrected`."""


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
def _scale_step(log_scale, groups, scale_top, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """What a row's scales are multiples of in their code; of no use where those are fp16."""
    index = tl.arange(0, GROUPS)
    scale = tl.exp(tl.load(log_scale + index, mask=index < groups, other=-1e30))
    steps = scale_top + 1.0
    largest = tl.max(scale, axis=0) * (steps / tl.maximum(scale_top, 1.0))
    return largest.to(tl.float16).to(tl.float32) / steps


@triton.jit  # type: ignore[untyped-decorator]
def _stored(scale, step, scale_top):  # type: ignore[no-untyped-def]
    """Scales as their code will hold them; scale_top 0: in fp16."""
    near = tl.minimum(tl.maximum(tl.floor(scale / step + 0.5), 1.0), scale_top) * step
    return tl.where(scale_top > 0.0, near, scale.to(tl.float16).to(tl.float32))


@triton.jit  # type: ignore[untyped-decorator]
def _address(entry, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where a tensor of KIND begins; torch's memory and eight rows of any are multiples of 16."""
    return tl.multiple_of(tl.load(entry), 16).to(tl.pointer_type(KIND))


@triton.jit  # type: ignore[untyped-decorator]
def _entry(numbers, KIND: tl.constexpr, EVEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where this program's matrix is, of KIND, and the latent's own tensors; their extents."""
    width = tl.load(numbers + 10)
    if EVEN:
        width = tl.multiple_of(width, 16)
    return (
        _address(numbers, tl.float32), _address(numbers + 1, tl.float32),
        _address(numbers + 2, tl.float32), _address(numbers + 3, KIND),
        tl.load(numbers + 8), tl.load(numbers + 9), width,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _places(  # type: ignore[no-untyped-def]
    row, first, groups, size, width, SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    """Some groups of a row: their index, which are there, where their weights lie and are held.

    Of the weights [groups, size]: places in the latent and in the matrix, and two masks for these.
    """
    index, place = first + tl.arange(0, BLOCK), tl.arange(0, SIZE)
    inside, group = index < groups, row * groups + index
    column = index[:, None] * size + place[None, :]
    held = inside[:, None] & (place < size)[None, :]
    here = group[:, None] * size + place[None, :]
    return group, inside, here, held, row * width + column, held & (column < width)


@triton.jit  # type: ignore[untyped-decorator]
def _write(  # type: ignore[no-untyped-def]
    numbers, reals, size,
    LEVELS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr,
    KIND: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    numbers += tl.program_id(0) * _NUMBERS
    reals += tl.program_id(0) * _REALS
    position, log_scale, points, weight, rows, groups, width = _entry(numbers, KIND, EVEN)
    top, unit, scale_top = tl.load(reals), tl.load(reals + 1), tl.load(reals + 3)
    for row in range(tl.program_id(1), rows, tl.num_programs(1)):
        step = _scale_step(log_scale + row * groups, groups, scale_top, GROUPS)
        for first in range(0, groups, BLOCK):
            group, inside, here, held, there, stored = _places(
                row, first, groups, size, width, SIZE, BLOCK
            )
            x = tl.load(position + here, mask=held, other=0.0)
            scale = tl.exp(tl.load(log_scale + group, mask=inside, other=0.0))
            scale = _stored(scale, step, scale_top) * unit
            value = _nearest(x, points, group, inside, top, LEVELS) * scale[:, None]
            tl.store(weight + there, value.to(KIND), mask=stored)


@triton.jit  # type: ignore[untyped-decorator]
def _moved(parameter, first, second, gradient, mask, rate, root, b1, b2, eps):  # type: ignore[no-untyped-def]
    """Adam on what lies at three addresses: the parameter and its two running means."""
    mean = tl.load(first, mask=mask, other=0.0) * b1 + gradient * (1.0 - b1)
    square = tl.load(second, mask=mask, other=0.0) * b2 + gradient * gradient * (1.0 - b2)
    tl.store(first, mean, mask=mask)
    tl.store(second, square, mask=mask)
    moved = tl.load(parameter, mask=mask, other=0.0) - rate * mean / (tl.sqrt(square) / root + eps)
    tl.store(parameter, moved, mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _descend(  # type: ignore[no-untyped-def]
    numbers, reals, size, b1, b2, eps,
    LEVELS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr,
    KIND: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    numbers += tl.program_id(0) * _NUMBERS
    reals += tl.program_id(0) * _REALS
    position, log_scale, points, gradient, rows, groups, width = _entry(numbers, KIND, EVEN)
    mean, square = _address(numbers + 4, tl.float32), _address(numbers + 5, tl.float32)
    scale_mean, scale_square = _address(numbers + 6, tl.float32), _address(numbers + 7, tl.float32)
    top, unit, reach = tl.load(reals), tl.load(reals + 1), tl.load(reals + 2)
    scale_top = tl.load(reals + 3)
    rate, scale_rate, root = tl.load(reals + 4), tl.load(reals + 5), tl.load(reals + 6)
    for row in range(tl.program_id(1), rows, tl.num_programs(1)):
        step = _scale_step(log_scale + row * groups, groups, scale_top, GROUPS)
        for first in range(0, groups, BLOCK):
            group, inside, here, held, there, stored = _places(
                row, first, groups, size, width, SIZE, BLOCK
            )
            x = tl.load(position + here, mask=held, other=0.0)
            given = tl.load(gradient + there, mask=stored, other=0.0).to(tl.float32)
            smooth = tl.exp(tl.load(log_scale + group, mask=inside, other=0.0))
            scale = _stored(smooth, step, scale_top) * unit
            if LEVELS == 0:
                pulled = (x > -reach) & (x < top + reach)
            else:
                low = tl.load(points + group * LEVELS, mask=inside, other=0.0) - reach
                high = tl.load(points + group * LEVELS + LEVELS - 1, mask=inside, other=0.0) + reach
                pulled = (x > low[:, None]) & (x < high[:, None])
            value = _nearest(x, points, group, inside, top, LEVELS)
            to_position = tl.where(pulled, given * scale[:, None], 0.0)
            to_scale = tl.sum(given * value, axis=1) * smooth * unit
            _moved(position + here, mean + here, square + here, to_position, held, rate, root,
                   b1, b2, eps)  # fmt: skip
            _moved(log_scale + group, scale_mean + group, scale_square + group, to_scale, inside,
                   scale_rate, root, b1, b2, eps)  # fmt: skip


def write_weights(latents: Sequence[Trainable], weights: Sequence[Tensor]) -> None:
    """Into each of weights [out, in]: the point next to each position, times its scale and unit.

    weights: contiguous, all of one float type. Scales are those that the latent's code stores.
    """
    still: list[Rates] = [(0.0, 0.0, 1.0)] * len(latents)
    _launched(_write, latents, weights, still)


def descend(
    latents: Sequence[Trainable],
    gradients: Sequence[Tensor],
    rates: Sequence[Rates],
    betas: tuple[float, float],
    eps: float,
) -> None:
    """A step of Adam for each, from the gradient [out, in] of its weight.

    Gradients pass straight through both roundings; none reaches positions further than the grid's
    reach beyond its outermost points. gradients: all of one float type.
    """
    whole = [gradient.contiguous() for gradient in gradients]
    _launched(_descend, latents, whole, rates, *betas, eps)


def _launched(
    kernel: Any,
    latents: Sequence[Trainable],
    matrices: Sequence[Tensor],
    rates: Sequence[Rates],
    *constants: float,
) -> None:
    """`kernel` on all, a launch for each form."""
    forms: dict[tuple[int, int], list[int]] = {}
    for index, latent in enumerate(latents):
        grid = latent.grid()
        levels = 0 if grid.top else grid.points.shape[-1]
        forms.setdefault((levels, latent.position.shape[2]), []).append(index)
    for (levels, size), chosen in forms.items():
        device = latents[chosen[0]].position.device
        numbers, reals = [], []
        for index in chosen:
            entries = _entries(latents[index], matrices[index])
            about = _reals(latents[index], rates[index])
            for entry in entries:
                numbers.append(entry)
                reals.append(about)
        padded = triton.next_power_of_2(size)
        groups = max(latents[index].position.shape[1] for index in chosen)
        with launched_on(device):
            kernel[(len(numbers), _PROGRAMS)](
                _sent(torch.tensor(numbers), device), _sent(torch.tensor(reals), device),
                size, *constants, LEVELS=levels, SIZE=padded,
                BLOCK=max(1, min(triton.next_power_of_2(groups), _WEIGHTS // padded)),
                GROUPS=triton.next_power_of_2(groups), KIND=_WIDTHS[matrices[chosen[0]].dtype],
                EVEN=all(matrices[index].shape[1] % 16 == 0 for index in chosen),
            )  # fmt: skip


def _entries(latent: Trainable, matrix: Tensor) -> Iterator[list[int]]:
    """Addresses and extents of a latent and its matrix [out, in], by at most _ROWS rows."""
    position, points = latent.position, latent.grid().points
    out, groups, _ = position.shape
    moments = latent.moments or (position,) * 4  # of no use before the first step
    tensors = (position, latent.log_scale, points, matrix, *moments)
    assert all(tensor.is_contiguous() for tensor in tensors)
    strides = [tensor.nbytes // out for tensor in tensors]
    places = [tensor.data_ptr() for tensor in tensors]
    for first in range(0, out, _ROWS):
        at = [place + first * stride for place, stride in zip(places, strides, strict=True)]
        yield [*at, min(_ROWS, out - first), groups, matrix.shape[1]]


def _reals(latent: Trainable, rates: Rates) -> list[float]:
    grid = latent.grid()
    scale_top = 0.0 if latent.scale_bits == 16 else float(2**latent.scale_bits - 1)
    return [float(grid.top), grid.unit, grid.reach, scale_top, *rates]


def _sent(table: Tensor, device: torch.device) -> Tensor:
    """`table` on `device`, without a wait for what runs there."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table
