"""Super Weight: keep the one weight that matters most, clip the rest, round to nearest."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from pliant.codes import Code, GroupInt, Sparse, Sum
from pliant.errors import PliantError
from pliant.methods.catalog import method
from pliant.methods.grid import fit_grid
from pliant.observe.statistics import Statistics

_DEVIATIONS = (1.5, 2.0, 2.5, 3.0, 4.0, 6.0, math.inf)


@method(
    "super_weight",
    kind="quantize",
    paper="The Super Weight in Large Language Models",
    needs=("input_max", "output_max"),
)
def super_weight(
    weight: Tensor,  # [out, in]
    statistics: Statistics,
    *,
    bits: int = 4,
    group_size: int = 256,
    deviations: float = 0.0,
    spike: float = 20.0,
    symmetric: bool = False,
    scale_bits: int = 16,
) -> Code:
    """Round to nearest with outliers clipped at z deviations and the super weight kept aside.

    The super weight (`locate`) is stored in fp16 and takes no part in its group's range; all
    other weights are clipped to `deviations` standard deviations of their group. 0 searches one
    z for the matrix by the squared error. Meant for large groups, where one outlier coarsens
    many weights. Cost: one round-to-nearest for each z. Source: Yu et al. 2024.
    """
    position = locate(statistics, spike)
    w = weight.float()
    if position is not None:
        w = w.clone()
        w[position] = 0.0
    size = w.shape[1] if group_size <= 0 else min(group_size, w.shape[1])
    best: tuple[float, GroupInt] | None = None
    for z in (deviations,) if deviations > 0 else _DEVIATIONS:
        clipped = _clip(w, size, z)
        grid = fit_grid(clipped, bits, size, symmetric=symmetric, clip=False, scale_bits=scale_bits)
        member = torch.arange(w.shape[1], device=w.device) // size
        scale, zero = grid.scales[:, member], grid.zeros[:, member]
        q = torch.round(clipped / scale.clamp_min(1e-12) + zero).clamp_(0, grid.top)
        if position is not None:
            q[position] = zero[position].floor()
        code = grid.pack(q.to(torch.uint8))
        error = float((code.decode() - w).square().sum())
        if best is None or error < best[0]:
            best = (error, code)
    assert best is not None
    if position is None:
        return best[1]
    row, column = position
    rest = weight[row, column].float() - best[1].rows(slice(row, row + 1))[0, column]
    coordinates = torch.tensor([row], device=w.device), torch.tensor([column], device=w.device)
    kept = Sparse.from_coordinates(*coordinates, rest[None], (w.shape[0], w.shape[1]))
    return Sum((best[1], kept))


def locate(statistics: Statistics, spike: float = 20.0) -> tuple[int, int] | None:
    """(output, input) of the super weight: where the largest |W x| meets the largest |x|.

    None unless both are spikes, at least `spike` times the median channel's. In the paper it is
    in the down projection of an early layer.
    """
    inputs, outputs = statistics.input_max, statistics.output_max
    if inputs is None or outputs is None:
        raise PliantError("super_weight needs the largest |x| and |W x|; observe them first")
    for channel in (inputs, outputs):
        if float(channel.max()) < spike * float(channel.median()):
            return None
    return int(outputs.argmax()), int(inputs.argmax())


def _clip(w: Tensor, size: int, deviations: float) -> Tensor:
    """w clipped to its group's mean plus or minus so many standard deviations."""
    if math.isinf(deviations):
        return w
    width = w.shape[1]
    extra = -width % size
    groups = pad(w, (0, extra)).view(w.shape[0], -1, size)
    count = pad(torch.ones(width, device=w.device), (0, extra)).view(1, -1, size)
    members = count.sum(-1, keepdim=True)
    mean = groups.sum(-1, keepdim=True) / members
    spread = (((groups - mean) ** 2 * count).sum(-1, keepdim=True) / members).sqrt() * deviations
    return groups.clamp(mean - spread, mean + spread).flatten(1)[:, :width]
