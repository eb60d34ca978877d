"""Binary and ternary: levels are the statistics that the paper names, and the bytes are exact."""

from __future__ import annotations

import pytest
import torch

from pliant.codes import GroupInt, Ternary
from pliant.errors import PliantError, RecipeError
from pliant.fit.recipe import RungSpec
from pliant.methods.numerics import weighted_error
from pliant.methods.quantize.binary_ternary import binary, ternary
from pliant.observe.statistics import Statistics

torch.set_num_threads(1)

NOTHING = Statistics()


def problem(out: int = 48, width: int = 150) -> tuple[torch.Tensor, Statistics]:
    torch.manual_seed(0)
    x = torch.randn(600, width) @ (torch.randn(width, width) / width**0.5 + torch.eye(width))
    x = x * torch.exp(0.5 * torch.randn(width))
    return torch.randn(out, width) * 0.05, Statistics(second_moment=x.T @ x / len(x))


def square(weight: torch.Tensor, code) -> float:
    return float((weight - code.decode()).square().sum() / weight.square().sum())


def test_levels_are_the_mean_magnitude_of_each_group() -> None:
    weight, _ = problem()
    for size in (64, 0):
        groups = torch.split(weight, size or 150, dim=1)
        mean = torch.stack([g.abs().mean(1) for g in groups], 1)
        alpha = mean.repeat_interleave(size or 150, 1)[:, :150]
        one = binary(weight, NOTHING, group_size=size)
        torch.testing.assert_close(one.decode().abs(), alpha, rtol=1e-3, atol=0)
        assert torch.equal(one.decode() > 0, weight > 0)
        three = ternary(weight, NOTHING, group_size=size).decode()
        kept = three != 0
        over = weight.abs() / (2 / 3 * alpha)  # the threshold is half of the scale
        clear = (over - 1).abs() > 2e-3  # of what rounding the scale to fp16 moves
        assert torch.equal(kept[clear], (over > 1)[clear])
        torch.testing.assert_close(three[kept].abs(), 4 / 3 * alpha[kept], rtol=1e-3, atol=0)
        assert torch.equal(three[kept] > 0, weight[kept] > 0)


def test_evenly_spread_weights_fall_in_equal_thirds_of_the_same_magnitude() -> None:
    weight = torch.linspace(-1, 1, 3000).view(1, 3000)
    code = ternary(weight, NOTHING, group_size=0)
    counts = torch.bincount(code.trits().flatten().long(), minlength=3)
    assert bool(((counts - 1000).abs() <= 2).all()), counts
    ratio = float(code.decode().abs().mean() / weight.abs().mean())
    assert abs(ratio - 8 / 9) < 2e-3, "4/3 of two thirds"


def test_levels_from_the_range_err_far_more() -> None:
    weight, _ = problem()
    for method in (binary, ternary):
        assert square(weight, method(weight, NOTHING)) < 0.6 * square(
            weight, method(weight, NOTHING, levels="max")
        )


def test_no_other_scale_errs_less_than_the_optimal_one() -> None:
    weight, statistics = problem(16, 60)
    h = statistics.second_moment.diagonal()
    for method, grid in ((binary, (-1, 1)), (ternary, (-1, 0, 1))):
        best = method(weight, statistics, levels="optimal", group_size=0).decode()
        levels = torch.tensor(grid).float()
        for alpha in torch.linspace(0.2, 3.0, 57) * float(weight.abs().mean()):
            nearest = (weight[..., None] - alpha * levels).abs().argmin(-1)
            other = (alpha * levels)[nearest]
            errors = [((weight - d).square() * h).sum(1) for d in (best, other)]
            assert bool((errors[0] <= errors[1] * 1.002).all()), (method.__name__, alpha)


@pytest.mark.parametrize("scale_bits", [6, 16])
def test_bytes(scale_bits: int) -> None:
    weight, _ = problem()
    scales = 48 * 3 * 2 if scale_bits == 16 else 48 * (1 + 2 + 2)
    one = binary(weight, NOTHING, group_size=64, scale_bits=scale_bits)
    assert isinstance(one, GroupInt)
    assert one.nbytes == 48 * 19 + scales
    three = ternary(weight, NOTHING, group_size=64, scale_bits=scale_bits)
    assert isinstance(three, Ternary)
    assert three.nbytes == 48 * 30 + scales


@pytest.mark.parametrize("method", [binary, ternary])
def test_feedback_lowers_the_error_at_the_outputs(method) -> None:
    weight, statistics = problem()
    moment = statistics.second_moment
    plain, fed = (method(weight, statistics, feedback=f) for f in (False, True))
    assert fed.nbytes == plain.nbytes
    plain_error, fed_error = (weighted_error(weight - c.decode(), moment) for c in (plain, fed))
    assert fed_error < 0.8 * plain_error
    assert square(weight, plain) < square(weight, fed), "and pays for it at the weights"


def test_what_is_wrong_or_missing_is_told() -> None:
    weight, statistics = problem(4, 10)
    for method in (binary, ternary):
        with pytest.raises(PliantError, match="levels"):
            method(weight, statistics, levels="median")
        with pytest.raises(PliantError, match="second moment"):
            method(weight, NOTHING, feedback=True)
        silent = Statistics(second_moment=torch.zeros(10, 10))
        assert bool(torch.isfinite(method(weight, silent, levels="optimal").decode()).all())
        assert float(method(torch.zeros(4, 10), statistics).decode().abs().max()) < 1e-6


def test_a_recipe_can_ask_for_it_and_is_told_what_is_wrong() -> None:
    for method in ("binary", "ternary"):
        for levels in ("mean", "max", "optimal"):
            for feedback in (False, True):
                options = {"levels": levels, "feedback": feedback, "scale_bits": 6}
                RungSpec(method=method, options=options).check()
    with pytest.raises(RecipeError, match="levels"):
        RungSpec(method="ternary", options={"levels": "median"}).check()
