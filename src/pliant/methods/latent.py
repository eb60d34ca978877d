"""Group integers that can be trained: each weight's place on its grid, and the scales."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from pliant.codes import GroupInt
from pliant.codes.group_int import quantize_scales

_MARGIN = 0.45  # of a step: how far from its grid point a weight may start


class LatentInt:
    """A `GroupInt` as continuous parameters, with straight-through gradients.

    position [out, groups, group_size]: each weight in steps of its grid; its nearest integer is
    what is stored. log_scale [out, groups]. `weight()` is what the code of `encode()` decodes to.
    Zero points stay as they are. Sources: Learned Step Size Quantization (both learned together);
    EfficientQAT: Efficient Quantization-Aware Training for Large Language Models (starting from
    a calibrated rounding).
    """

    def __init__(self, code: GroupInt, weight: Tensor) -> None:
        """code: where training starts. weight [out, in]: the original, on the code's device.

        A weight starts where the original lies, but never beyond the integer that the code chose,
        so the first forward pass is the code's, and a rounding that the code forced flips easily.
        """
        self.code = code
        self.top = 2**code.bit_width - 1
        self.zeros = code.zeros_as()[..., None]
        scales = code.scales_as().clamp_min(1e-8)
        q, original = self._grouped(code.integers().float()), self._grouped(weight)
        free = original / scales[..., None] + self.zeros
        low = torch.where(q == 0, torch.minimum(free, q - _MARGIN), q - _MARGIN)
        high = torch.where(q == self.top, torch.maximum(free, q + _MARGIN), q + _MARGIN)
        position = torch.minimum(torch.maximum(free, low), high).clamp_(-0.5, self.top + 0.5)
        self.position = position.requires_grad_(True)
        self.log_scale = scales.log().requires_grad_(True)

    def weight(self) -> Tensor:
        """[out, in] float32, differentiable in position and log_scale."""
        scales = self.log_scale.exp()
        rounding = _as_stored(scales.detach(), self.code.stored_scales.bits) - scales.detach()
        grouped: Tensor = _FakeQuantize.apply(  # type: ignore[no-untyped-call]
            self.position, scales + rounding, self.zeros, self.top
        )
        weight: Tensor = grouped.flatten(1)[:, : self.code.width]
        return weight

    @torch.no_grad()
    def encode(self) -> GroupInt:
        """The code of what is learned, of as many bytes as the one that training started from."""
        stored = quantize_scales(self.log_scale.exp(), self.code.stored_scales.bits)
        q = self.position.round().clamp(0, self.top).flatten(1)[:, : self.code.width]
        zeros = None if self.code.zeros is None else self.zeros[..., 0].to(torch.uint8)
        return GroupInt.pack(
            q.to(torch.uint8), stored, zeros, self.code.bit_width, self.code.group_size
        )

    def _grouped(self, matrix: Tensor) -> Tensor:
        out, width = matrix.shape
        size = self.code.group_size
        return pad(matrix, (0, -width % size)).view(out, -1, size)


def _as_stored(scales: Tensor, bits: int) -> Tensor:
    """`quantize_scales(scales, bits).scales_as()`, without packing and without waiting."""
    if bits == 16:
        return scales.half().float()
    top = 2**bits - 1
    unit = (scales.amax(1, keepdim=True) * (2**bits / top)).half().float() * 2.0**-bits
    rounded: Tensor = (scales / unit).round_().clamp_(1, top).mul_(unit)
    return rounded


class _FakeQuantize(torch.autograd.Function):
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
        inside = (position > -0.5) & (position < ctx.top + 0.5)
        to_position = (gradient * scales[..., None]).mul_(inside)
        return to_position, (gradient * steps).sum(-1), None, None
