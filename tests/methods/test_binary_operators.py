"""Binary operators: each has the scale that it names, and finer scales or terms err less."""

from __future__ import annotations

import pytest
import torch

from pliant.codes import Codebook, GroupInt, Sum
from pliant.errors import PliantError, RecipeError
from pliant.fit.recipe import RungSpec
from pliant.methods.numerics import weighted_error
from pliant.methods.quantize.binary_operators import binary_operators
from pliant.methods.quantize.gptq import inverse_factor
from pliant.observe.statistics import Statistics

torch.set_num_threads(1)

NOTHING = Statistics()
OPERATORS = ("tensor", "channel", "group", "residual")


def problem(out: int = 48, width: int = 150) -> tuple[torch.Tensor, Statistics]:
    """Rows and groups of unlike magnitude, correlated inputs."""
    torch.manual_seed(0)
    spread = torch.exp(
        0.5 * torch.randn(out, 1) + 0.3 * torch.randn(out, 5).repeat_interleave(30, 1)
    )
    x = torch.randn(600, width) @ (torch.randn(width, width) / width**0.5 + torch.eye(width))
    return torch.randn(out, width) * spread * 0.05, Statistics(second_moment=x.T @ x / len(x))


def test_one_scale_for_the_matrix_the_row_or_the_group() -> None:
    weight, _ = problem()
    made = {o: binary_operators(weight, NOTHING, operator=o, group_size=30) for o in OPERATORS}
    for operator in ("tensor", "channel", "group"):
        assert torch.equal(made[operator].decode() > 0, weight > 0)
    assert isinstance(made["tensor"], Codebook)
    alpha = {
        "tensor": weight.abs().mean().expand(48, 150),
        "channel": weight.abs().mean(1, keepdim=True).expand(48, 150),
        "group": weight.abs().view(48, 5, 30).mean(2).repeat_interleave(30, 1),
    }
    for operator, expected in alpha.items():
        torch.testing.assert_close(made[operator].decode().abs(), expected, rtol=1e-3, atol=0)
    assert made["tensor"].nbytes == 48 * 19 + 4
    assert made["channel"].nbytes == 48 * (19 + 2)
    assert made["group"].nbytes == 48 * (19 + 10)
    assert made["residual"].nbytes == 2 * made["group"].nbytes


@pytest.mark.parametrize("feedback", [False, True])
def test_finer_scales_and_a_second_term_err_less(feedback: bool) -> None:
    weight, statistics = problem()
    moment = statistics.second_moment if feedback else torch.eye(150)
    errors = [
        weighted_error(
            weight
            - binary_operators(
                weight, statistics, operator=o, group_size=30, feedback=feedback
            ).decode(),
            moment,
        )
        for o in OPERATORS
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.5 * errors[2]


def test_the_residual_term_is_the_operator_applied_to_what_is_left() -> None:
    weight, _ = problem()
    code = binary_operators(weight, NOTHING, operator="residual", group_size=30)
    assert isinstance(code, Sum)
    first = binary_operators(weight, NOTHING, operator="group", group_size=30)
    assert isinstance(first, GroupInt)
    assert torch.equal(code.parts[0].decode(), first.decode())
    second = binary_operators(weight - first.decode(), NOTHING, operator="group", group_size=30)
    assert torch.equal(code.parts[1].decode(), second.decode())


@pytest.mark.parametrize("operator", OPERATORS)
def test_feedback_lowers_the_error_at_the_outputs_for_the_same_bytes(operator: str) -> None:
    weight, statistics = problem()
    plain, fed = (
        binary_operators(weight, statistics, operator=operator, feedback=f) for f in (False, True)
    )
    assert fed.nbytes == plain.nbytes
    before, after = (
        weighted_error(weight - code.decode(), statistics.second_moment) for code in (plain, fed)
    )
    assert after < 0.85 * before


def test_two_signs_with_feedback_follow_the_column_by_column_rule() -> None:
    """Against the plain loop: both signs of each column, its error fed to the rest."""
    weight, statistics = problem(6, 150)
    code = binary_operators(weight, statistics, operator="residual", group_size=20, feedback=True)
    assert isinstance(code, Sum)
    a, b = (part.scales_as() / 2 for part in code.parts)
    factor, order = inverse_factor(statistics.second_moment, damp=0.1)
    left = weight.clone()
    for place, column in enumerate(order.tolist()):
        g = column // 20
        one = torch.where(left[:, column] > 0, a[:, g], -a[:, g])
        value = one + torch.where(left[:, column] > one, b[:, g], -b[:, g])
        torch.testing.assert_close(code.decode()[:, column], value, rtol=1e-5, atol=1e-7)
        share = (left[:, column] - value) / factor[place, place]
        left[:, order[place + 1 :]] -= share[:, None] * factor[place, place + 1 :]


def test_what_is_wrong_or_missing_is_told() -> None:
    weight, statistics = problem(4, 150)
    with pytest.raises(PliantError, match="operator"):
        binary_operators(weight, statistics, operator="column")
    for operator in OPERATORS:
        with pytest.raises(PliantError, match="second moment"):
            binary_operators(weight, NOTHING, operator=operator, feedback=True)


def test_a_recipe_can_ask_for_it_and_is_told_what_is_wrong() -> None:
    for operator in OPERATORS:
        for feedback in (False, True):
            options = {"operator": operator, "feedback": feedback}
            RungSpec(method="binary_operators", options=options).check()
    with pytest.raises(RecipeError, match="operator"):
        RungSpec(method="binary_operators", options={"operator": "column"}).check()
