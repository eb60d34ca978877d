"""LoRC: the best low-rank term in the plain norm, at exactly the bytes of its factors."""

from __future__ import annotations

import pytest
import torch

from pliant.codes import LowRank, Sum
from pliant.errors import RecipeError
from pliant.methods.catalog import find
from pliant.methods.repair.lorc import lorc
from pliant.observe.statistics import Statistics

torch.set_num_threads(1)


def problem() -> tuple[torch.Tensor, Statistics]:
    torch.manual_seed(0)
    mix = torch.randn(128, 128) / 128**0.5
    weight = torch.randn(64, 128) * 0.05
    return weight, Statistics(second_moment=mix @ mix.T)


@pytest.mark.parametrize("base", ["rtn", "gptq"])
def test_the_error_is_what_svd_leaves_at_each_rank(base: str) -> None:
    weight, statistics = problem()
    error = weight - find(base).function(weight, statistics, bits=3).decode()
    values = torch.linalg.svdvals(error)
    for rank in (1, 8, 32):
        code = lorc(weight, statistics, base=base, rank=rank, bits=3)
        left = (weight - code.decode()).norm()
        torch.testing.assert_close(left, values[rank:].norm(), rtol=2e-3, atol=0)


def test_full_rank_restores_the_weight() -> None:
    weight, statistics = problem()
    for rank in (64, 1000):
        code = lorc(weight, statistics, rank=rank, bits=2)
        assert float((code.decode() - weight).abs().max()) < 2e-3 * float(weight.abs().max())


def test_bytes_are_the_base_and_both_factors() -> None:
    weight, statistics = problem()
    code = lorc(weight, statistics, rank=8)
    assert isinstance(code, Sum)
    assert isinstance(code.parts[1], LowRank)
    base = find("gptq").function(weight, statistics).nbytes
    assert code.nbytes == base + 8 * (64 + 128) * 2
    small = lorc(weight, statistics, rank=8, factor_bits=8)
    assert small.nbytes == base + 8 * (64 + 128) + 2 * (64 + 8 * 2)


def test_eight_bit_factors_keep_the_gain() -> None:
    weight, statistics = problem()
    error = {
        bits: float((weight - lorc(weight, statistics, bits=2, factor_bits=bits).decode()).norm())
        for bits in (16, 8)
    }
    base = float((weight - find("gptq").function(weight, statistics, bits=2).decode()).norm())
    assert base - error[8] > 0.97 * (base - error[16])


def test_options_reach_the_base_and_wrong_ones_are_told() -> None:
    weight, statistics = problem()
    fine = lorc(weight, statistics, bits=4, group_size=16)
    assert isinstance(fine, Sum)
    assert fine.parts[0].meta()["group_size"] == 16
    with pytest.raises(RecipeError, match="bitz"):
        lorc(weight, statistics, bitz=4)
    with pytest.raises(RecipeError, match="no method"):
        lorc(weight, statistics, base="nothing")
    with pytest.raises(RecipeError, match="repair"):
        lorc(weight, statistics, base="eora")
    with pytest.raises(RecipeError, match="rank"):
        lorc(weight, statistics, rank=0)
    with pytest.raises(RecipeError, match="factor_bits"):
        lorc(weight, statistics, factor_bits=4)
