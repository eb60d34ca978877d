"""Super Weight: keep the one weight that matters most, clip the rest, round to nearest."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from pliant.codes import Code, Sparse, Sum, quantize_scales
from pliant.errors import PliantError
from pliant.methods.catalog import method
from pliant.methods.grid import Grid, fit_grid
from pliant.observe.statistics import Statistics

_DEVIATIONS = (math.inf, 8.0, 6.0, 5.0, 4.0, 3.5, 3.0, 2.5, 2.0, 1.5)  # a tie clips less


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

    The super weight (`locate`) is stored in fp16 and takes no part in its group's range; other
    weights saturate at `deviations` standard deviations of their group. The paper tunes one z by
    perplexity; 0 takes each group's z of least squared error, inputs weighted by their mean
    square, or by their largest square where the second moment is not known. Unweighted the search
    clips what large inputs meet, and is worse than no clipping. Meant for large groups, where
    one outlier coarsens many weights. Cost: one round-to-nearest for each z. Source: Yu et al.
    2024.
    """
    position = locate(statistics, spike)
    w = weight.float()
    if position is not None:
        w = w.clone()
        w[position] = 0.0
    size = w.shape[1] if group_size <= 0 else min(group_size, w.shape[1])
    candidates = (deviations,) if deviations > 0 else _DEVIATIONS
    grid = _choose(w, _importance(statistics), size, candidates, bits, symmetric, scale_bits)
    q = _round(w, grid, size)
    if position is not None:
        q[position] = grid.zeros[position[0], position[1] // size].floor()
    code = grid.pack(q.to(torch.uint8))
    if position is None:
        return code
    row, column = position
    rest = weight[row, column].float() - code.rows(slice(row, row + 1))[0, column]
    coordinates = torch.tensor([row], device=w.device), torch.tensor([column], device=w.device)
    kept = Sparse.from_coordinates(*coordinates, rest[None], (w.shape[0], w.shape[1]))
    return Sum((code, kept))


def _importance(statistics: Statistics) -> Tensor:
    """What an error at each input [in] costs."""
    if statistics.second_moment is not None:
        return statistics.second_moment.diagonal().float()
    assert statistics.input_max is not None
    return statistics.input_max.float().square()


def _choose(
    w: Tensor,
    importance: Tensor,
    size: int,
    candidates: Sequence[float],
    bits: int,
    symmetric: bool,
    scale_bits: int,
) -> Grid:
    """The grid whose groups have each the best range of those clipped at `candidates`."""
    extra = -w.shape[1] % size
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for z in candidates:
        found = fit_grid(_clip(w, size, z), bits, size, symmetric=symmetric, clip=False)
        member = torch.arange(w.shape[1], device=w.device) // size
        error = (_round(w, found, size) - found.zeros[:, member]) * found.scales[:, member] - w
        loss = pad(error.square() * importance, (0, extra)).view(w.shape[0], -1, size).sum(-1)
        if best is None:
            best = loss, found.scales, found.zeros
            continue
        better = loss < best[0]
        best = (
            torch.where(better, loss, best[0]),
            torch.where(better, found.scales, best[1]),
            torch.where(better, found.zeros, best[2]),
        )
    assert best is not None
    stored = quantize_scales(best[1], scale_bits)
    return Grid(bits, size, symmetric, stored, stored.scales_as(), best[2])


def _round(w: Tensor, grid: Grid, size: int) -> Tensor:
    """Nearest integers [out, in], float."""
    member = torch.arange(w.shape[1], device=w.device) // size
    q = w / grid.scales.clamp_min(1e-12)[:, member] + grid.zeros[:, member]
    return q.round_().clamp_(0, grid.top)


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
