"""Super Weight: found by its spikes, kept exactly, and worth more in larger blocks."""

from __future__ import annotations

import pytest
import torch

from pliant.codes import GroupInt, Sum
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


def test_the_searched_clip_is_no_worse_than_any_fixed_one() -> None:
    weight, statistics = problem()
    searched = super_weight(weight, statistics, bits=3).decode()
    for z in (2.0, 3.0, 1e9):
        fixed = super_weight(weight, statistics, bits=3, deviations=z).decode()
        assert (searched - weight).square().sum() <= (fixed - weight).square().sum() * 1.0001


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
