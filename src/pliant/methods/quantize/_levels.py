"""What binary and ternary methods share: scales from statistics of |w|, and rounding to a grid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from pliant.codes import Ternary, quantize_scales
from pliant.errors import PliantError
from pliant.methods.grid import Grid
from pliant.methods.quantize.gptq import inverse_factor, round_with_feedback
from pliant.observe.statistics import Statistics

_TILE = 1 << 20  # weights rounded at once


@dataclass(frozen=True, eq=False)
class TernaryGrid(Grid):
    """`w = (q - 1) * scale`, q of 0, 1 and 2."""

    @property
    def top(self) -> int:
        return 2

    def code(self, integers: Tensor) -> Ternary:
        """The code of `integers` [out, in] uint8 on this grid."""
        return Ternary.pack(integers, self.stored, self.group_size)


def binary_grid(alpha: Tensor, group_size: int, scale_bits: int) -> Grid:
    """The levels -alpha and +alpha of each group. alpha: [out, groups]."""
    stored = quantize_scales(2 * alpha.clamp_min(1e-8), scale_bits)
    zeros = torch.full_like(alpha, 0.5)
    return Grid(1, group_size, True, stored, stored.scales_as(), zeros)


def ternary_grid(alpha: Tensor, group_size: int, scale_bits: int) -> TernaryGrid:
    """The levels -alpha, 0 and +alpha of each group. alpha: [out, groups]."""
    stored = quantize_scales(alpha.clamp_min(1e-8), scale_bits)
    zeros = torch.ones_like(alpha)
    return TernaryGrid(2, group_size, True, stored, stored.scales_as(), zeros)


def magnitudes(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """(|w| by group, 1 where it is no padding): [out, groups, size], [groups, size].

    group_size 0 or less: one group a row. The last group may be ragged; padding is 0.
    """
    out, width = weight.shape
    size = width if group_size <= 0 else min(group_size, width)
    extra = -width % size
    real = pad(torch.ones(width, device=weight.device), (0, extra)).view(-1, size)
    return pad(weight.float().abs(), (0, extra)).view(out, -1, size), real


def mean_magnitude(weight: Tensor, group_size: int) -> Tensor:
    """Mean of |w| of each group: the best scale of its signs in squared error. [out, groups]"""
    absolute, real = magnitudes(weight, group_size)
    return absolute.sum(-1) / real.sum(-1)


def rounded(weight: Tensor, grid: Grid, statistics: Statistics, feedback: bool) -> Tensor:
    """Integers [out, in] uint8: the nearest levels, or with errors fed forward as in GPTQ."""
    if feedback:
        factor, order = feedback_factor(statistics)
        return round_with_feedback(weight, grid, factor, order)
    width = weight.shape[1]
    size = width if grid.group_size <= 0 else grid.group_size
    group = torch.arange(width, device=weight.device) // size
    integers = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    step = max(1, _TILE // width)
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        q = weight[rows].float() / grid.scales[rows][:, group] + grid.zeros[rows][:, group]
        integers[rows] = q.round_().clamp_(0, grid.top).to(torch.uint8)
    return integers


def feedback_factor(statistics: Statistics) -> tuple[Tensor, Tensor]:
    """GPTQ's factor and order of columns; PliantError without a second moment."""
    if statistics.second_moment is None:
        raise PliantError("feedback needs the second moment of the inputs; observe it first")
    return inverse_factor(statistics.second_moment, damp=0.1)
