"""BitMoD: a group's type is the best of four, and the selector is counted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pliant.errors import PliantError
from pliant.methods.levels import fit_levels, integer_levels, minifloat_levels
from pliant.methods.numerics import weighted_error
from pliant.methods.quantize.bitmod import bitmod, bitmod_gptq, data_types
from pliant.observe.statistics import Statistics
from tests.methods.problems import problem

torch.set_num_threads(1)


def heavy(out: int = 64, width: int = 300) -> Tensor:
    torch.manual_seed(0)
    return torch.distributions.StudentT(6.0).sample((out, width)) * 0.02


@pytest.mark.parametrize("bits", [3, 4])
def test_types_are_small_floats_with_one_more_level(bits: int) -> None:
    basic = set(minifloat_levels(2, bits - 3).tolist())
    specials = []
    for levels in data_types(bits):
        assert bool((levels.diff() > 0).all()), "no pattern is wasted on a negative zero"
        (special,) = set(levels.tolist()) - basic
        specials.append(special)
        assert set(levels.tolist()) - {special} == basic
    assert sorted(specials) == {3: [-6, -3, 3, 6], 4: [-8, -5, 5, 8]}[bits]


@pytest.mark.parametrize("bits", [3, 4])
def test_selectors_are_counted(bits: int) -> None:
    code = bitmod(heavy(), Statistics(), bits=bits)
    groups, tables = 3, 4
    row = {3: 75 + 38, 4: 150}[bits] + groups + 2 + 1  # indices, scales, factor, selectors
    assert code.nbytes == 64 * row + 2 * tables * 2**bits
    assert set(code.selected().unique().tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("bits", [3, 4])
def test_the_mixture_beats_every_fixed_type_and_most_at_three_bits(bits: int) -> None:
    weight = heavy()

    def loss(tables: Tensor) -> float:
        code = fit_levels(weight, tables, 128, scale_bits=8).round(weight)
        return float((code.decode() - weight).square().sum())

    mixture = float((bitmod(weight, Statistics(), bits=bits).decode() - weight).square().sum())
    assert mixture == pytest.approx(loss(data_types(bits)))
    fixed = [loss(levels[None]) for levels in data_types(bits)]
    plain_float, integers = (
        loss(minifloat_levels(2, bits - 3)[None]),
        loss(integer_levels(bits)[None]),
    )
    assert mixture < min(fixed)
    assert mixture < {3: 0.85, 4: 0.93}[bits] * min(plain_float, integers)


def test_a_group_with_one_long_side_takes_the_range_on_that_side() -> None:
    weight = torch.tensor([[6.0, 4, -4, 2, -2, 1, -1, 0], [-6.0, 4, -4, 2, -2, 1, -1, 0]])
    code = bitmod(weight, Statistics(), bits=3, group_size=8, scale_bits=16)
    assert torch.equal(code.decode(), weight)
    special = data_types(3)[code.selected().long().flatten()].abs().amax(1)
    assert special.tolist() == [6.0, 6.0]


@pytest.mark.parametrize("bits", [3, 4])
def test_feedback_lowers_the_error_at_the_outputs(bits: int) -> None:
    weight, statistics = problem()
    assert statistics.second_moment is not None
    codes = [f(weight, statistics, bits=bits) for f in (bitmod, bitmod_gptq)]
    assert codes[0].nbytes == codes[1].nbytes
    plain, fed = (weighted_error(c.decode() - weight, statistics.second_moment) for c in codes)
    assert fed < 0.8 * plain


def test_other_widths_are_refused() -> None:
    with pytest.raises(PliantError, match="3 or 4"):
        bitmod(torch.eye(4), Statistics(), bits=5)
