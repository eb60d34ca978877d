"""Super Weight: found by its spikes, kept exactly, and worth more in larger blocks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pliant.codes import Code, GroupInt, Sum
from pliant.errors import PliantError
from pliant.methods.grid import fit_grid
from pliant.methods.quantize.super_weight import locate, super_weight
from pliant.observe.statistics import Statistics

torch.set_num_threads(1)
ROW, COLUMN = 11, 700


def problem() -> tuple[torch.Tensor, Statistics]:
    torch.manual_seed(0)
    weight = torch.randn(32, 1024) * 0.02
    weight[ROW, COLUMN] = 1.7
    weight += torch.where(torch.rand(32, 1024) < 0.002, torch.randn(32, 1024) * 0.12, 0.0)
    weight = weight.half().float()
    x = torch.randn(64, 1024)
    x[5, COLUMN] = 300.0
    y = x @ weight.T
    return weight, Statistics(input_max=x.abs().amax(0), output_max=y.abs().amax(0))


def nearest(weight: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    grid = fit_grid(weight, bits, group_size, clip=False)
    member = torch.arange(weight.shape[1]) // group_size
    scale, zero = grid.scales[:, member], grid.zeros[:, member]
    return (torch.round(weight / scale + zero).clamp(0, grid.top) - zero) * scale


def test_it_is_where_the_spikes_meet() -> None:
    _, statistics = problem()
    assert locate(statistics) == (ROW, COLUMN)
    calm = Statistics(input_max=torch.rand(9) + 1, output_max=torch.rand(5) + 1)
    assert locate(calm) is None


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_the_super_weight_is_preserved_exactly(bits: int, symmetric: bool) -> None:
    weight, statistics = problem()
    code = super_weight(weight, statistics, bits=bits, symmetric=symmetric)
    assert isinstance(code, Sum)
    tolerance = 1e-3 if bits == 1 else 0.0
    assert float((code.decode() - weight)[ROW, COLUMN].abs()) <= tolerance
    assert code.nbytes == code.parts[0].nbytes + 2 + 2 + 1, "a value, its column and its row"


def test_the_gain_over_round_to_nearest_grows_with_the_block() -> None:
    weight, statistics = problem()
    gains = []
    for size in (64, 256, 1024):
        kept = super_weight(weight, statistics, group_size=size).decode()
        plain = nearest(weight, 4, size)
        ordinary = torch.ones(32, 1024, dtype=torch.bool)
        ordinary[ROW, COLUMN] = False
        errors = [float((d - weight)[ordinary].square().sum()) for d in (plain, kept)]
        gains.append(errors[0] / errors[1])
    assert gains[0] > 1.0
    assert gains[0] < gains[1] < gains[2]
    assert gains[2] > 1.5


def weighted(code: Code, weight: torch.Tensor, importance: torch.Tensor) -> float:
    return float(((code.decode() - weight).square() * importance).sum())


@pytest.mark.parametrize("known", [True, False])
def test_the_searched_clip_is_no_worse_than_any_fixed_one(known: bool) -> None:
    weight, statistics = problem()
    assert statistics.input_max is not None
    importance = statistics.input_max.square()
    if known:
        importance = torch.rand(1024) ** 4
        moment = torch.diag(importance)
        statistics = replace(statistics, second_moment=moment)
    searched = super_weight(weight, statistics, bits=3)
    for z in (1.5, 2.0, 3.0, 4.0, 1e9):
        fixed = super_weight(weight, statistics, bits=3, deviations=z)
        assert searched.nbytes == fixed.nbytes
        assert weighted(searched, weight, importance) <= 1.001 * weighted(fixed, weight, importance)


def test_what_a_large_input_meets_is_not_clipped() -> None:
    """A weight of six deviations costs little in plain squares and much at its input."""
    weight = torch.randn(32, 1024, generator=torch.Generator().manual_seed(2)) * 0.02
    weight[:, 3] = 0.16
    quiet, loud = torch.ones(1024), torch.ones(1024)
    loud[3] = 300.0
    error = []
    for energy in (quiet, loud):
        calm = Statistics(
            second_moment=torch.diag(energy), input_max=torch.ones(1024), output_max=torch.ones(32)
        )
        decoded = super_weight(weight, calm, bits=3, group_size=0).decode()
        error.append(float((decoded - weight)[:, 3].abs().max()))
    assert error[0] > 0.05
    assert error[1] < 0.02


def test_without_a_spike_it_is_round_to_nearest_with_a_clip() -> None:
    weight, _ = problem()
    calm = Statistics(input_max=torch.ones(1024), output_max=torch.ones(32))
    assert isinstance(super_weight(weight, calm), GroupInt)


def test_a_ragged_last_group_is_clipped_by_its_own_spread() -> None:
    torch.manual_seed(1)
    weight = torch.randn(4, 70)
    weight[:, 64:] *= 0.01
    calm = Statistics(input_max=torch.ones(70), output_max=torch.ones(4))
    decoded = super_weight(weight, calm, group_size=64, deviations=3.0).decode()
    assert float((decoded - weight)[:, 64:].abs().max()) < 0.005


def test_missing_statistics_are_told() -> None:
    with pytest.raises(PliantError, match="observe"):
        super_weight(torch.zeros(2, 2), Statistics())
