"""minifloat: the searched split is the best one, and one exponent bit is an integer grid."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pliant.errors import PliantError
from pliant.methods.grid import fit_grid
from pliant.methods.numerics import weighted_error
from pliant.methods.quantize.minifloat import minifloat, minifloat_gptq
from pliant.observe.statistics import Statistics
from tests.methods.problems import problem

torch.set_num_threads(1)


def weights(degrees: float) -> Tensor:
    torch.manual_seed(0)
    return torch.distributions.StudentT(degrees).sample((64, 256)) * 0.02


def loss(weight: Tensor, **options: object) -> float:
    return float((minifloat(weight, Statistics(), **options).decode() - weight).square().sum())


@pytest.mark.parametrize("bits", range(3, 9))
def test_the_searched_split_is_the_best_of_all(bits: int) -> None:
    weight = weights(4.0)
    splits = range(1, min(5, bits - 1) + 1)
    losses = [loss(weight, bits=bits, exponent=e) for e in splits]
    assert loss(weight, bits=bits) == min(losses)
    assert len(set(losses)) == len(losses)


def test_heavier_tails_want_more_exponent() -> None:
    best = []
    for weight in (torch.rand(64, 256) - 0.5, weights(6.0), weights(2.1)):
        losses = [loss(weight, bits=6, exponent=e, group_size=0) for e in (1, 2, 3, 4)]
        best.append(losses.index(min(losses)) + 1)
    assert best[0] == 1, "uniform weights want a uniform grid"
    assert best == sorted(best)
    assert best[2] > best[0]


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_one_exponent_bit_is_symmetric_integers(bits: int) -> None:
    weight = weights(4.0)
    code = minifloat(weight, Statistics(), bits=bits, exponent=1, clip=False)
    step = code.tables[0].float().diff().max()
    top = 2 ** (bits - 1) - 1
    assert torch.equal(code.tables[0].float()[-top - 1 :], step * torch.arange(top + 1))
    grid = fit_grid(weight, bits, 64, symmetric=True, clip=False)
    torch.testing.assert_close(code.scales_as() * step, grid.scales, rtol=1e-3, atol=0)


def test_channels_that_carry_more_decide() -> None:
    weight = weights(4.0)
    energy = torch.ones(256)
    energy[::8] = 100.0
    known = Statistics(tokens=1, second_moment=torch.diag(energy))
    error = [
        float(((minifloat(weight, s, bits=3).decode() - weight).square() * energy).sum())
        for s in (Statistics(), known)
    ]
    assert error[1] < 0.9 * error[0]


@pytest.mark.parametrize("bits", [3, 4])
def test_feedback_lowers_the_error_at_the_outputs(bits: int) -> None:
    weight, statistics = problem()
    assert statistics.second_moment is not None
    codes = [f(weight, statistics, bits=bits) for f in (minifloat, minifloat_gptq)]
    assert codes[0].nbytes == codes[1].nbytes
    plain, fed = (weighted_error(c.decode() - weight, statistics.second_moment) for c in codes)
    assert fed < 0.8 * plain


def test_formats_that_do_not_exist_are_refused() -> None:
    for options in ({"bits": 2}, {"bits": 9}, {"bits": 4, "exponent": 4}, {"exponent": -1}):
        with pytest.raises(PliantError, match="minifloat"):
            minifloat(torch.eye(4), Statistics(), **options)
