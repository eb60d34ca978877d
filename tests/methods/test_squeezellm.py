"""SqueezeLLM: levels follow the Fisher information, and the sparse part is exact."""

from __future__ import annotations

import pytest
import torch

from pliant.codes import Codebook, Sparse, Sum
from pliant.errors import PliantError
from pliant.methods.grid import fit_grid
from pliant.methods.quantize.squeezellm import squeezellm
from pliant.observe.statistics import Statistics

torch.set_num_threads(1)


def problem(out: int = 48, width: int = 200) -> tuple[torch.Tensor, Statistics]:
    torch.manual_seed(0)
    weight = torch.distributions.StudentT(4.0).sample((out, width)) * 0.02
    fisher = torch.exp(2.0 * torch.randn(out, width)) * (weight > 0).float().add(0.02)
    return weight, Statistics(fisher=fisher)


def loss(weight: torch.Tensor, decoded: torch.Tensor, statistics: Statistics) -> float:
    return float((statistics.fisher * (weight - decoded) ** 2).sum())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_weighted_beats_unweighted_beats_round_to_nearest_at_equal_levels(bits: int) -> None:
    weight, statistics = problem()
    options = {"bits": bits, "outliers": 0.0, "sensitive": 0.0}
    weighted = squeezellm(weight, statistics, **options)
    flat = squeezellm(weight, Statistics(fisher=torch.ones_like(weight)), **options)
    grid = fit_grid(weight, bits, 0, clip=False)
    q = torch.round(weight / grid.scales + grid.zeros).clamp(0, grid.top)
    nearest = grid.pack(q.to(torch.uint8)).decode()
    assert weighted.nbytes == flat.nbytes
    weighted_loss = loss(weight, weighted.decode(), statistics)
    flat_loss = loss(weight, flat.decode(), statistics)
    assert weighted_loss < 0.8 * flat_loss
    assert flat_loss < 0.8 * loss(weight, nearest, statistics)
    square = [float((weight - d).square().sum()) for d in (flat.decode(), weighted.decode())]
    assert square[0] < square[1], "unweighted k-means is the better one without the weights"


def test_outliers_and_sensitive_values_are_exact_and_lower_the_loss() -> None:
    weight, statistics = problem()
    weight = weight.half().float()
    dense = squeezellm(weight, statistics, bits=3, outliers=0.0, sensitive=0.0)
    both = squeezellm(weight, statistics, bits=3, outliers=0.01, sensitive=0.005)
    assert isinstance(dense, Codebook)
    assert isinstance(both, Sum)
    assert isinstance(both.parts[1], Sparse)
    kept = both.parts[1].values.numel()
    assert 0.01 * weight.numel() - 1 <= kept <= 0.015 * weight.numel()
    assert both.nbytes == dense.nbytes + kept * 3 + 48  # uint8 columns and row counts
    decoded = both.decode()
    largest = weight.abs().flatten().topk(int(0.01 * weight.numel())).indices
    scale = weight.abs().max()
    assert float((decoded - weight).flatten()[largest].abs().max()) < 1e-3 * scale
    score = (statistics.fisher * weight**2).flatten()
    most = score.topk(int(0.005 * weight.numel())).indices
    assert float((decoded - weight).flatten()[most].abs().max()) < 1e-3 * scale
    assert loss(weight, decoded, statistics) < 0.6 * loss(weight, dense.decode(), statistics)


def test_groups_lower_the_loss_and_cost_their_levels() -> None:
    weight, statistics = problem()
    options = {"bits": 3, "outliers": 0.0, "sensitive": 0.0}
    rows = squeezellm(weight, statistics, **options)
    groups = squeezellm(weight, statistics, group_size=64, **options)
    assert loss(weight, groups.decode(), statistics) < loss(weight, rows.decode(), statistics)
    assert groups.nbytes - rows.nbytes == 48 * 3 * 8 * 2  # 200 inputs are four groups of 64


def test_without_fisher_it_says_what_is_missing() -> None:
    with pytest.raises(PliantError, match="Fisher"):
        squeezellm(torch.zeros(2, 2), Statistics())
    with pytest.raises(PliantError, match="shares"):
        squeezellm(torch.zeros(2, 2), Statistics(fisher=torch.ones(2, 2)), outliers=1.5)


def test_a_dead_layer_is_still_stored() -> None:
    weight = torch.randn(4, 32)
    decoded = squeezellm(weight, Statistics(fisher=torch.zeros(4, 32)), bits=4).decode()
    assert float((decoded - weight).square().mean()) < 0.02
