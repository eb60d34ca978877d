"""PD-Quant: each row's scale factor chosen by what the error does to the prediction."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pliant.codes import GroupInt
from pliant.codes.group_int import quantize_scales
from pliant.errors import PliantError
from pliant.methods.catalog import method
from pliant.methods.grid import Grid, fit_grid
from pliant.methods.quantize.gptq import inverse_factor, round_with_feedback
from pliant.observe.statistics import Statistics


@method(
    "pd_quant",
    kind="quantize",
    paper="PD-Quant: Post-Training Quantization based on Prediction Difference Metric",
    needs=("second_moment", "pairs"),
)
def pd_quant(
    weight: Tensor,  # [out, in]
    statistics: Statistics,
    *,
    bits: int = 3,
    group_size: int = 64,
    symmetric: bool = False,
    scale_bits: int = 16,
    feedback: bool = True,
    damp: float = 0.1,
    candidates: tuple[float, ...] = (1.0, 0.8, 0.87, 0.93, 1.07, 1.15),
    local: float = 16.0,
    passes: int = 2,
) -> GroupInt:
    """Scales that minimise the change of the prediction, instead of each layer's own error.

    The prediction difference is the KL divergence of the final predictions to second order: half
    the mean square of sum_i c_i over the sampled tokens, c_i = g_i (e_i . x) what the error e_i
    of row i adds to the log-likelihood. From the grid of least squared error, every row multiplies
    its scales by one of `candidates`, row after row against the sum of all others (coordinate
    descent, `passes` times); errors are those of the row as it will be rounded, with GPTQ's
    feedback or (`feedback=False`) to the nearest.

    `local` weighs the row's own mean square of c_i beside the sum: a regulariser against fitting
    the sample, where the paper corrects the activations' distribution. The sample's tokens are
    not those by which a rung's damage is predicted. Cost: for each candidate a rounding of the
    weight and a product with the sample, kept in 4 n bytes a row; then a small step a row.
    Source: Liu et al. 2023, who take the difference from whole forward passes.
    """
    pairs, moment = statistics.pairs, statistics.second_moment
    if pairs is None or moment is None:
        raise PliantError("pd_quant needs sampled inputs with their gradients; observe them first")
    if not candidates or min(candidates) <= 0 or passes < 1:
        raise PliantError("pd_quant takes positive candidates and at least one pass")
    start = fit_grid(
        weight, bits, group_size,
        symmetric=symmetric, importance=moment.diagonal(), scale_bits=scale_bits,
    )  # fmt: skip
    grids = [_scaled(start, factor, scale_bits) for factor in candidates]
    solver = inverse_factor(moment, damp=damp) if feedback else None
    integers = [_round(weight, grid, solver) for grid in grids]
    changes = torch.stack(
        [_changes(grid.pack(q).decode().sub_(weight), *pairs)
         for grid, q in zip(grids, integers, strict=True)]
    )  # fmt: skip
    chosen = choose_rows(changes, local=local, passes=passes)
    rows = torch.arange(len(weight), device=weight.device)
    scales = torch.stack([grid.scales for grid in grids])[chosen, rows]
    zeros = torch.stack([grid.zeros for grid in grids])[chosen, rows]
    stored = quantize_scales(scales, scale_bits)
    grid = Grid(bits, group_size, symmetric, stored, stored.scales_as(), zeros)
    return grid.pack(torch.stack(integers)[chosen, rows])


def prediction_difference(error: Tensor, inputs: Tensor, gradients: Tensor) -> float:
    """Nats a token, to second order, for the error [out, in] on pairs [n, in] and [n, out]."""
    return 0.5 * float(_changes(error, inputs, gradients).sum(0).square().mean())


def choose_rows(changes: Tensor, *, local: float = 1.0, passes: int = 2) -> Tensor:
    """For each row the candidate [out] that minimises the mean square of the sum over rows.

    changes [candidates, out, n]: c of each candidate of each row. Starts from candidate 0.
    """
    out, device = changes.shape[1], changes.device
    changes = changes.cpu()  # row after row: on a GPU each small step would cost several launches
    own = changes.square().sum(-1)
    chosen = torch.zeros(out, dtype=torch.int64)
    total = changes[0].sum(0)
    for _ in range(passes):
        before = chosen.clone()
        for row in range(out):
            options = changes[:, row]
            rest = total - options[chosen[row]]
            # |rest + c|^2 without what all candidates share
            score = 2 * (options @ rest) + (1 + local) * own[:, row]
            chosen[row] = score.argmin()
            total = rest + options[chosen[row]]
        if torch.equal(chosen, before):
            break
    return chosen.to(device)


def _changes(error: Tensor, inputs: Tensor, gradients: Tensor) -> Tensor:
    """g_i (e_i . x) for each row and token: [out, n]."""
    return (error @ inputs.t()).mul_(gradients.t())


def _scaled(grid: Grid, factor: float, scale_bits: int) -> Grid:
    stored = quantize_scales(grid.scales * factor, scale_bits)
    return replace(grid, stored=stored, scales=stored.scales_as())


def _round(weight: Tensor, grid: Grid, solver: tuple[Tensor, Tensor] | None) -> Tensor:
    """Integers [out, in] uint8: with feedback, or each weight to the nearest."""
    if solver is not None:
        return round_with_feedback(weight, grid, *solver)
    size = weight.shape[1] if grid.group_size <= 0 else grid.group_size
    group = torch.arange(weight.shape[1], device=weight.device) // size
    q = weight.float() / grid.scales.clamp_min(1e-12)[:, group]
    return q.add_(grid.zeros[:, group]).round_().clamp_(0, grid.top).to(torch.uint8)
