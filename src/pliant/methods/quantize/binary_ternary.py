"""Binary and ternary weights whose levels come from statistics of the weights, not their range."""

from __future__ import annotations

import torch
from torch import Tensor

from pliant.codes import GroupInt, Ternary
from pliant.errors import PliantError
from pliant.methods.catalog import method
from pliant.methods.quantize._levels import (
    binary_grid,
    magnitudes,
    mean_magnitude,
    rounded,
    ternary_grid,
)
from pliant.observe.statistics import Statistics

_PAPER = "Binary and Ternary Natural Language Generation"


@method("binary", kind="quantize", paper=_PAPER, needs=("second_moment",))
def binary(
    weight: Tensor,  # [out, in]
    statistics: Statistics,
    *,
    levels: str = "mean",
    group_size: int = 64,
    feedback: bool = False,
    scale_bits: int = 16,
) -> GroupInt:
    """Each weight to -alpha or +alpha of its group by its sign; one bit and the scales.

    levels: "mean" takes alpha = mean |w|, the least squared error; "max" takes max |w|, for
    comparison; "optimal" weighs the mean by the inputs' mean square. group_size 0: one alpha a
    row. `feedback` lets later columns make up for the errors of earlier ones, as GPTQ does. The
    second moment is for "optimal" and `feedback` alone. Cost: a pass, or GPTQ's. Source: Liu et
    al. 2023, without the elastic activations and the training.
    """
    if levels == "mean":
        alpha = mean_magnitude(weight, group_size)
    else:
        absolute, importance = _weighted(weight, statistics, group_size, levels)
        if levels == "max":
            alpha = absolute.amax(-1)
        else:
            alpha = (absolute * importance).sum(-1) / importance.sum(-1)
    grid = binary_grid(alpha, group_size, scale_bits)
    return grid.pack(rounded(weight, grid, statistics, feedback))


@method("ternary", kind="quantize", paper=_PAPER, needs=("second_moment",))
def ternary(
    weight: Tensor,  # [out, in]
    statistics: Statistics,
    *,
    levels: str = "mean",
    group_size: int = 64,
    feedback: bool = False,
    scale_bits: int = 16,
) -> Ternary:
    """Each weight to the nearest of -alpha, 0 and +alpha of its group; 1.6 bits and the scales.

    levels: "mean" takes alpha = 4/3 mean |w|, which splits evenly spread weights into equal
    thirds and keeps their magnitude; the threshold is alpha / 2, or 2/3 mean |w|. "max" takes
    max |w|, for comparison. "optimal" takes the alpha of least squared error, inputs weighted by
    their mean square. Other options and the source as in `binary`. Cost: a pass; a sort of each
    group for "optimal".
    """
    if levels == "mean":
        alpha = mean_magnitude(weight, group_size) * (4 / 3)
    else:
        absolute, importance = _weighted(weight, statistics, group_size, levels)
        alpha = absolute.amax(-1) if levels == "max" else _least_squares(absolute, importance)
    grid = ternary_grid(alpha, group_size, scale_bits)
    return grid.code(rounded(weight, grid, statistics, feedback))


def _weighted(
    weight: Tensor, statistics: Statistics, group_size: int, levels: str
) -> tuple[Tensor, Tensor]:
    """(|w|, weight of each squared error): [out, groups, size], [groups, size]."""
    if levels not in ("max", "optimal"):
        raise PliantError(f"levels is mean, max or optimal, not {levels!r}")
    absolute, real = magnitudes(weight, group_size)
    if statistics.second_moment is None:
        return absolute, real
    diagonal = statistics.second_moment.diagonal().float()[None]
    importance, _ = magnitudes(diagonal, group_size)
    # An input that never fired still counts a little, so that no group is without weight.
    return absolute, (importance[0] + 1e-6 * diagonal.mean() + 1e-30) * real


def _least_squares(absolute: Tensor, importance: Tensor) -> Tensor:
    """The alpha of least weighted error: the weighted mean of the k largest |w|, for the best k.

    Keeping the k largest lowers the error by (sum h |w|)^2 / sum h over them. [out, groups]
    """
    largest, order = absolute.sort(-1, descending=True)
    h = torch.gather(importance.expand_as(absolute), -1, order)
    mass, moment = h.cumsum(-1), (h * largest).cumsum(-1)
    best = (moment.square() / mass.clamp_min(1e-30)).argmax(-1, keepdim=True)
    alpha: Tensor = (moment.gather(-1, best) / mass.gather(-1, best).clamp_min(1e-30))[..., 0]
    return alpha
