"""LittleBit: packed signs and scales within the bytes asked for; each step lowers the error."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from pliant.codes import GroupInt, LowRank, Scaled, Sum
from pliant.errors import PliantError, RecipeError
from pliant.fit.recipe import RungSpec
from pliant.methods.factorize._binary_factors import BinaryFactors, dual_svid, refine
from pliant.methods.factorize.littlebit import littlebit
from pliant.methods.latent_factors import LatentFactors
from pliant.methods.numerics import project_error, weighted_error
from pliant.observe.statistics import Statistics

torch.set_num_threads(1)

START = {"rounds": 0, "rotations": 0}


def problem(out: int = 96, width: int = 120) -> tuple[torch.Tensor, Statistics]:
    """A weight with a falling spectrum, and inputs of which some channels matter more."""
    torch.manual_seed(0)
    spectrum = torch.arange(1, 61).float().pow(-0.7)
    weight = (torch.randn(out, 60) * spectrum) @ torch.randn(60, width) * 0.05
    x = torch.randn(1000, width) @ (torch.randn(width, width) / width**0.5 + torch.eye(width))
    x = x * torch.exp(0.7 * torch.randn(width))
    return weight, Statistics(second_moment=x.T @ x / len(x))


def error(weight: torch.Tensor, code, statistics: Statistics) -> float:
    moment = statistics.second_moment
    assert moment is not None
    return weighted_error(weight - code.decode(), moment) / weighted_error(weight, moment)


@pytest.mark.parametrize("bits", [0.5, 0.7, 1.0, 1.5])
@pytest.mark.parametrize("residual", [False, True])
def test_bytes_are_packed_signs_and_scales_within_the_bits_asked_for(
    bits: float, residual: bool
) -> None:
    weight = torch.randn(256, 320)
    code = littlebit(weight, Statistics(), bits=bits, residual=residual, **START)
    parts = code.parts if isinstance(code, Sum) else (code,)
    assert len(parts) == 1 + residual
    signs_and_scales = 0
    for part in parts:
        assert isinstance(part, Scaled)
        assert isinstance(part.inner, LowRank)
        u, v = part.inner.a, part.inner.b
        assert isinstance(u, GroupInt)
        assert isinstance(v, GroupInt)
        rank = part.inner.rank
        signs_and_scales += 256 * -(-rank // 8) + rank * 40 + 2 * (256 + rank + 320)
        one_more = BinaryFactors.size(256, 320, rank + 1)
        assert one_more > bits * 256 * 320 / 8 / len(parts), "no larger rank fits"
    assert code.nbytes == signs_and_scales <= bits * 256 * 320 / 8


def test_the_start_is_dual_svid() -> None:
    weight, _ = problem()
    a, b = project_error(weight, 24)
    factors = dual_svid(weight, 24, torch.ones(120))
    assert torch.equal(factors.u, torch.where(a >= 0, 1.0, -1.0))
    assert torch.equal(factors.v, torch.where(b >= 0, 1.0, -1.0))
    for scales in (factors.row, factors.latent, factors.column):
        assert bool((scales >= 0).all())
    assert float((factors.dense() - weight).norm()) < float(weight.norm())


def test_a_matrix_of_that_form_comes_back() -> None:
    """One sign vector each way is a rank-1 matrix, which the start finds exactly."""
    torch.manual_seed(1)
    row, column = torch.rand(40) + 0.5, torch.rand(56) + 0.5
    signs = torch.outer(torch.randn(40).sign(), torch.randn(56).sign())
    weight = row[:, None] * signs * column
    code = dual_svid(weight, 1, torch.ones(56)).code()
    torch.testing.assert_close(code.decode(), weight, rtol=3e-3, atol=1e-4)


def test_no_step_of_the_refinement_raises_the_weighted_error() -> None:
    weight, statistics = problem()
    moment = statistics.second_moment
    assert moment is not None
    factors = dual_svid(weight, 40, moment.diagonal().sqrt())
    errors = [weighted_error(weight - factors.dense(), moment)]
    for _ in range(5):
        factors = refine(factors, weight, moment)
        errors.append(weighted_error(weight - factors.dense(), moment))
        for values in (factors.u, factors.v):
            assert bool((values.abs() == 1).all())
    assert all(b <= a * (1 + 1e-4) for a, b in pairwise(errors)), errors
    assert errors[1] < 0.6 * errors[0]
    assert errors[-1] < 0.95 * errors[1]


def test_below_one_bit_it_beats_signs_with_row_scales_and_svd_of_the_same_bytes() -> None:
    weight, statistics = problem(192, 240)
    for bits in (0.5, 0.7):
        code = littlebit(weight, statistics, bits=bits)
        rank = max(1, code.nbytes // (2 * (192 + 240)))
        svd = LowRank.from_factors(*project_error(weight, rank, statistics.second_moment))
        assert error(weight, code, statistics) < 0.9 * error(weight, svd, statistics)
    alpha = weight.abs().mean(1, keepdim=True)
    signs = GroupInt.pack(weight > 0, 2 * alpha, None, 1, 0)
    code = littlebit(weight, statistics, bits=0.9)
    assert code.nbytes < signs.nbytes
    assert error(weight, code, statistics) < error(weight, signs, statistics)


def test_the_residual_term_helps_the_papers_start_at_the_same_bytes() -> None:
    weight, statistics = problem(192, 240)
    single = littlebit(weight, statistics, bits=1.0, residual=False, **START)
    double = littlebit(weight, statistics, bits=1.0, residual=True, **START)
    assert double.nbytes <= 1.0 * 192 * 240 / 8
    assert error(weight, double, statistics) < error(weight, single, statistics)


def test_more_bits_and_more_rounds_err_less() -> None:
    weight, statistics = problem()
    errors = [
        error(weight, littlebit(weight, statistics, bits=b), statistics) for b in (0.6, 1.0, 1.5)
    ]
    assert errors == sorted(errors, reverse=True)
    rounds = [error(weight, littlebit(weight, statistics, rounds=n), statistics) for n in (0, 1, 4)]
    assert rounds == sorted(rounds, reverse=True)


def test_small_and_silent_weights_still_get_a_code() -> None:
    tiny = littlebit(torch.eye(64), Statistics(second_moment=torch.eye(64)), bits=0.3)
    assert isinstance(tiny, Scaled)
    assert tiny.inner.shape == (64, 64)
    zero = littlebit(torch.zeros(40, 72), Statistics(second_moment=torch.zeros(72, 72)), bits=1.5)
    assert bool(torch.isfinite(zero.decode()).all())
    assert float(zero.decode().abs().max()) < 1e-3
    for wrong in ({"bits": 0.0}, {"rounds": -1}, {"damp": 0.0}):
        with pytest.raises(PliantError):
            littlebit(torch.eye(8), Statistics(), **wrong)


@pytest.mark.parametrize("residual", [False, True])
def test_latent_factors_start_at_the_code_and_learn_at_the_same_bytes(residual: bool) -> None:
    weight, statistics = problem()
    code = littlebit(weight, statistics, bits=1.0, residual=residual, rounds=0)
    latent = LatentFactors(code, weight)
    near = 1e-3 * float(weight.abs().max())
    torch.testing.assert_close(latent.weight().detach(), code.decode(), rtol=1e-3, atol=near)
    again = latent.encode()
    torch.testing.assert_close(again.decode(), code.decode(), rtol=1e-3, atol=near)
    rates = (1e-3, 2e-3)
    optimizer = torch.optim.Adam([{"params": p} for p in (latent.positions, latent.log_scales)])
    losses = []
    for step in range(150):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - step / 150)
        e = latent.weight() - weight
        loss = (e @ statistics.second_moment * e).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    learned = latent.encode()
    assert learned.nbytes == code.nbytes
    torch.testing.assert_close(learned.decode(), latent.weight().detach(), rtol=1e-3, atol=near)
    before = [p.inner.a.planes for p in (code.parts if residual else (code,))]
    after = [p.inner.a.planes for p in (learned.parts if residual else (learned,))]
    flipped = [not torch.equal(b[0], a[0]) for b, a in zip(before, after, strict=True)]
    assert any(flipped), "training flips signs, it does not move scales alone"
    with pytest.raises(PliantError, match="littlebit"):
        LatentFactors(GroupInt.pack(weight > 0, torch.ones(96, 1), None, 1, 0), weight)


def test_a_recipe_can_ask_for_it_and_is_told_what_is_wrong() -> None:
    for options in ({}, {"bits": 0.3}, {"bits": 1.5, "residual": False}, {"rounds": 0}):
        RungSpec(method="littlebit", options=options).check()
    with pytest.raises(RecipeError, match="bits"):
        RungSpec(method="littlebit", options={"bits": -1.0}).check()
