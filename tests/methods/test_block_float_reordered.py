"""Reordering: outlier channels share blocks, the order is undone, and it pays."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pliant import kernels
from pliant.codes import Permuted
from pliant.errors import PliantError
from pliant.methods.numerics import weighted_error
from pliant.methods.quantize.block_float import block_float
from pliant.methods.quantize.block_float_reordered import (
    block_float_reordered,
    block_float_reordered_gptq,
)
from pliant.observe.statistics import Statistics
from tests.methods.problems import problem

torch.set_num_threads(1)
FLAT = Statistics(tokens=1, second_moment=torch.eye(256))


def outlier_channels() -> Tensor:
    """One channel in sixteen is thirty times larger: every block of sixteen in order has one."""
    torch.manual_seed(0)
    weight = torch.randn(32, 256) * 0.02
    weight[:, 5::16] *= 30
    return weight


def test_outliers_share_their_blocks() -> None:
    weight = outlier_channels()
    code = block_float_reordered(weight, FLAT)
    assert isinstance(code, Permuted)
    assert set(code.order[:16].tolist()) == set(range(5, 256, 16))
    plain = block_float(weight, Statistics())
    assert code.nbytes == plain.nbytes + 256, "one byte an input"
    ordinary = torch.ones(256, dtype=torch.bool)
    ordinary[5::16] = False
    errors = [(c.decode() - weight)[:, ordinary].square().sum() for c in (code, plain)]
    assert float(errors[0]) < 0.05 * float(errors[1])


@pytest.mark.parametrize("method", [block_float_reordered, block_float_reordered_gptq])
@pytest.mark.parametrize("by", ["weight", "input"])
def test_channels_come_back_in_their_own_order(method, by: str) -> None:
    weight, statistics = problem(width=97)
    weight += torch.arange(97) * 0.01
    code = method(weight, statistics, bits=8, by=by, shared_bits=8, clip=False)
    assert float((code.decode() - weight).abs().max()) < 0.02
    x = torch.randn(3, 97)
    torch.testing.assert_close(kernels.matmul(x, code), x @ code.decode().t(), rtol=1e-4, atol=1e-4)


def test_the_order_follows_what_was_asked_for() -> None:
    weight, statistics = problem()
    assert statistics.second_moment is not None
    for by, magnitude in (
        ("weight", weight.square().mean(0)),
        ("input", statistics.second_moment.diagonal()),
    ):
        order = block_float_reordered(weight, statistics, by=by).order.long()
        assert bool((magnitude[order].diff() <= 0).all())


def test_feedback_lowers_the_error_at_the_outputs() -> None:
    weight, statistics = problem()
    assert statistics.second_moment is not None
    codes = [
        f(weight, statistics, bits=3) for f in (block_float_reordered, block_float_reordered_gptq)
    ]
    assert codes[0].nbytes == codes[1].nbytes
    plain, fed = (weighted_error(c.decode() - weight, statistics.second_moment) for c in codes)
    assert fed < 0.8 * plain


def test_what_is_missing_is_told() -> None:
    with pytest.raises(PliantError, match="second moment"):
        block_float_reordered(torch.eye(4), Statistics())
    with pytest.raises(PliantError, match="by must be"):
        block_float_reordered(outlier_channels(), FLAT, by="name")
