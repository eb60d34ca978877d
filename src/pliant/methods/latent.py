"""Codes that can be trained: each weight's place on its grid, and the scales."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from pliant.codes import Code, GroupInt, GroupLevels, GroupScales, quantize_scales

_MARGIN = 0.45  # of a step: how far from its grid point a weight may start
_REACH = 0.5  # steps beyond the outermost grid point at which a weight stops being pulled


class Grid(NamedTuple):
    """What positions are rounded to, and how far beyond it they are still pulled.

    points [out, groups, k]: the levels of each group, rising, or its zero point where `top` is the
    largest integer. unit: of a level, in scales.
    """

    points: Tensor
    reach: float
    top: int = 0
    unit: float = 1.0


class Latent(ABC):
    """A code as continuous parameters, with straight-through gradients.

    position [out, groups, group_size]: each weight on the scale of its group's grid, in steps of
    about one integer; what is nearest is stored. log_scale [out, groups]. `weight()` is what the
    code of `encode()` decodes to. moments: Adam's running means of position's gradients and of
    their squares, then of log_scale's; none before the first of `steps`. Sources: Learned Step
    Size Quantization (positions and scales learned together); EfficientQAT: Efficient
    Quantization-Aware Training for Large Language Models (starting from a calibrated rounding).
    """

    position: Tensor
    log_scale: Tensor
    moments: tuple[Tensor, ...] = ()
    steps: int = 0
    bits: int
    scale_bits: int
    width: int
    group_size: int

    @abstractmethod
    def weight(self) -> Tensor:
        """[out, in] float32, differentiable in position and log_scale."""

    @abstractmethod
    def encode(self) -> Code:
        """The code of what is learned, of as many bytes as the one that training started from."""

    @abstractmethod
    def grid(self) -> Grid:
        """What positions are rounded to."""

    def begin_step(self) -> None:
        """Count a step, with moments to take it with."""
        self.steps += 1
        if not self.moments:
            parameters = (self.position, self.position, self.log_scale, self.log_scale)
            self.moments = tuple(torch.zeros_like(each, requires_grad=False) for each in parameters)

    def _scales(self) -> Tensor:
        scales = self.log_scale.exp()
        return scales + (_as_stored(scales.detach(), self.scale_bits) - scales.detach())

    def _grouped(self, matrix: Tensor) -> Tensor:
        out, width = matrix.shape
        return pad(matrix, (0, -width % self.group_size)).view(out, -1, self.group_size)

    def _flat(self, grouped: Tensor) -> Tensor:
        return grouped.flatten(1)[:, : self.width]


def latent_of(code: Code, weight: Tensor) -> Latent | None:
    """The trainable form of a code, None for one that has none.

    code: where training starts. weight [out, in]: the original, on the code's device. A weight
    starts where the original lies, but never beyond the cell that the code chose, so the first
    forward pass is the code's, and a rounding that the code forced flips easily.
    """
    if isinstance(code, GroupInt):
        return LatentInt(code, weight)
    if isinstance(code, GroupLevels) and isinstance(code.stored_scales, GroupScales):
        return LatentLevels(code, code.stored_scales, weight)
    return None


class LatentInt(Latent):
    """A trainable `GroupInt`; zero points stay as they are."""

    def __init__(self, code: GroupInt, weight: Tensor) -> None:
        self._code = code
        self.bits, self.width = code.bit_width, code.width
        self.scale_bits = code.stored_scales.bits
        self.group_size, self._top = code.group_size, 2**code.bit_width - 1
        self._zeros = code.zeros_as()[..., None]
        scales = code.scales_as().clamp_min(1e-8)
        q, original = self._grouped(code.integers().float()), self._grouped(weight)
        free = original / scales[..., None] + self._zeros
        low = torch.where(q == 0, torch.minimum(free, q - _MARGIN), q - _MARGIN)
        high = torch.where(q == self._top, torch.maximum(free, q + _MARGIN), q + _MARGIN)
        position = torch.minimum(torch.maximum(free, low), high)
        self.position = position.clamp_(-_REACH, self._top + _REACH).requires_grad_(True)
        self.log_scale = scales.log().requires_grad_(True)

    def weight(self) -> Tensor:
        grouped: Tensor = _FakeIntegers.apply(  # type: ignore[no-untyped-call]
            self.position, self._scales(), self._zeros, self._top
        )
        return self._flat(grouped)

    def grid(self) -> Grid:
        return Grid(self._zeros, _REACH, top=self._top)

    @torch.no_grad()
    def encode(self) -> GroupInt:
        stored = quantize_scales(self.log_scale.exp(), self.scale_bits)
        q = self._flat(self.position.round().clamp(0, self._top))
        zeros = None if self._code.zeros is None else self._zeros[..., 0].to(torch.uint8)
        return GroupInt.pack(
            q.to(torch.uint8), stored, zeros, self._code.bit_width, self.group_size
        )


class LatentLevels(Latent):
    """A trainable `GroupLevels`; tables, and which of them a group takes, stay as they are."""

    def __init__(self, code: GroupLevels, stored: GroupScales, weight: Tensor) -> None:
        self._code = code
        self.bits, self.width = code.bit_width, code.width
        self.scale_bits = stored.bits
        self.group_size = code.group_size
        tables = code.tables.float()
        # A position's unit is a mean step of the tables, so that rates mean what they do for
        # integers.
        self._unit = float((tables[:, -1] - tables[:, 0]).mean()) / (tables.shape[1] - 1)
        self._levels = (tables / self._unit)[code.selected().long()]  # [out, groups, levels]
        self._middles = (self._levels[..., 1:] + self._levels[..., :-1]) / 2
        scales = code.scales_as().clamp_min(1e-8)
        index = self._grouped(code.indices().float()).long()
        free = self._grouped(weight) / (scales * self._unit)[..., None]
        edge = self._middles.new_full((*self._middles.shape[:2], 1), torch.inf)
        low = torch.cat([-edge, self._middles], -1).gather(-1, index)
        high = torch.cat([self._middles, edge], -1).gather(-1, index)
        slack = (0.1 * (high - low)).nan_to_num(posinf=0.1).clamp(max=0.1)
        position = torch.minimum(torch.maximum(free, low + slack), high - slack)
        reach = self._levels[..., :1] - _REACH, self._levels[..., -1:] + _REACH
        position = torch.minimum(torch.maximum(position, reach[0]), reach[1])
        self.position = position.requires_grad_(True)
        self.log_scale = scales.log().requires_grad_(True)

    def weight(self) -> Tensor:
        grouped: Tensor = _FakeLevels.apply(  # type: ignore[no-untyped-call]
            self.position, self._scales() * self._unit, self._levels, self._middles
        )
        return self._flat(grouped)

    def grid(self) -> Grid:
        return Grid(self._levels, _REACH, unit=self._unit)

    @torch.no_grad()
    def encode(self) -> GroupLevels:
        stored = quantize_scales(self.log_scale.exp(), self.scale_bits)
        index = self._flat(_places(self.position, self._middles))
        selector = None if self._code.selector is None else self._code.selected()
        return GroupLevels.pack(
            index.to(torch.uint8), stored, self._code.tables, selector,
            self._code.bit_width, self.group_size,
        )  # fmt: skip


def _as_stored(scales: Tensor, bits: int) -> Tensor:
    """`quantize_scales(scales, bits).scales_as()`, without packing and without waiting."""
    if bits == 16:
        return scales.half().float()
    top = 2**bits - 1
    largest = scales.amax(1, keepdim=True) * (2**bits / top)
    unit: Tensor = largest.half().float() * 2.0**-bits
    return (scales / unit).round_().clamp_(1, top).mul_(unit)


def _places(position: Tensor, middles: Tensor) -> Tensor:
    """The level next to each position: how many middles [..., levels - 1] lie below it."""
    places = torch.zeros_like(position)
    for middle in middles.unbind(-1):
        places += position > middle[..., None]
    return places


class _FakeIntegers(torch.autograd.Function):
    """(clamp(round(position)) - zero) * scale; rounding passes gradients, clamping stops them."""

    @staticmethod
    def forward(ctx: Any, position: Tensor, scales: Tensor, zeros: Tensor, top: int) -> Tensor:
        steps = position.round().clamp_(0, top).sub_(zeros)
        ctx.save_for_backward(position, scales, steps.to(torch.bfloat16))
        ctx.top = top
        return steps.mul_(scales[..., None])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (gradient,) = gradients
        position, scales, steps = ctx.saved_tensors
        inside = (position > -_REACH) & (position < ctx.top + _REACH)
        to_position = (gradient * scales[..., None]).mul_(inside)
        return to_position, (gradient * steps).sum(-1), None, None


class _FakeLevels(torch.autograd.Function):
    """The level next to position, times scale; gradients as for integers."""

    @staticmethod
    def forward(
        ctx: Any, position: Tensor, scales: Tensor, levels: Tensor, middles: Tensor
    ) -> Tensor:
        values = levels[..., :1].expand_as(position).clone()
        for middle, gap in zip(middles.unbind(-1), levels.diff(dim=-1).unbind(-1), strict=True):
            values.addcmul_((position > middle[..., None]).to(values.dtype), gap[..., None])
        ctx.save_for_backward(position, scales, values.to(torch.bfloat16), levels)
        return values * scales[..., None]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (gradient,) = gradients
        position, scales, values, levels = ctx.saved_tensors
        low, high = levels[..., :1] - _REACH, levels[..., -1:] + _REACH
        inside = (position > low) & (position < high)
        to_position = (gradient * scales[..., None]).mul_(inside)
        return to_position, (gradient * values).sum(-1), None, None
