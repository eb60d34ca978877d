"""Round to nearest: every weight to the closest point of its group's grid."""

from __future__ import annotations

import torch
from torch import Tensor

from pliant.codes import GroupInt
from pliant.methods.catalog import method
from pliant.methods.grid import fit_grid
from pliant.observe import Statistics


@method(
    "rtn",
    kind="quantize",
    paper="Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only "
    "Inference (rounding); clipping as in Loss Aware Post-training Quantization",
)
def rtn(
    weight: Tensor,  # [out, in]
    statistics: Statistics,
    *,
    bits: int = 4,
    group_size: int = 64,
    symmetric: bool = False,
    clip: bool = True,
    scale_bits: int = 16,
) -> GroupInt:
    """Each weight to the nearest point of its group's grid, the group's range searched.

    `clip` tries narrower ranges and keeps, for each group, the one with the least squared error,
    inputs weighted by their mean square when that is known. Needs no data. Cost: a few passes
    over the weight for each clipping tried.
    """
    moment = statistics.second_moment
    importance = moment.diagonal() if moment is not None else None
    grid = fit_grid(
        weight, bits, group_size,
        symmetric=symmetric, importance=importance, clip=clip, scale_bits=scale_bits,
    )  # fmt: skip
    size = weight.shape[1] if group_size <= 0 else group_size
    group = torch.arange(weight.shape[1], device=weight.device) // size
    integers = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    tile = max(1, (1 << 20) // weight.shape[1])
    for start in range(0, weight.shape[0], tile):
        rows = slice(start, start + tile)
        scales = grid.scales[rows].clamp_min(1e-12)[:, group]
        q = (weight[rows].float() / scales).add_(grid.zeros[rows][:, group])
        integers[rows] = q.round_().clamp_(0, grid.top).to(torch.uint8)
    return grid.pack(integers)
