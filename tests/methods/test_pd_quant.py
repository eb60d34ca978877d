"""PD-Quant: a smaller prediction difference than the grid of least squares, on other tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pliant.errors import PliantError
from pliant.fit.recipe import RungSpec
from pliant.methods import find
from pliant.methods.quantize.pd_quant import choose_rows, pd_quant, prediction_difference
from pliant.observe.statistics import Statistics

torch.set_num_threads(1)
OUT, WIDTH, SAMPLE = 48, 64, 512


def problem(seed: int = 0) -> tuple[Tensor, Statistics, tuple[Tensor, Tensor]]:
    """All outputs move the prediction along a few directions, so errors of rows can cancel."""
    torch.manual_seed(seed)
    weight = torch.randn(OUT, WIDTH)
    mixed = torch.randn(WIDTH, WIDTH) / WIDTH**0.5
    directions = torch.randn(2, OUT)
    x = (torch.randn(2 * SAMPLE, WIDTH) + 0.5) @ mixed
    g = torch.randn(2 * SAMPLE, 2) @ directions
    fit, held_out = slice(0, SAMPLE), slice(SAMPLE, None)
    moment = x[fit].t() @ x[fit] / SAMPLE
    statistics = Statistics(SAMPLE, moment, inputs=x[fit], gradients=g[fit])
    return weight, statistics, (x[held_out], g[held_out])


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("feedback", [False, True])
def test_less_prediction_difference_than_least_squares_on_held_out_pairs(
    bits: int, feedback: bool
) -> None:
    ratios = []
    for seed in range(3):
        weight, statistics, (x, g) = problem(seed)
        base = find("gptq" if feedback else "rtn").function
        local = base(weight, statistics, bits=bits, group_size=32)
        chosen = pd_quant(weight, statistics, bits=bits, group_size=32, feedback=feedback)
        assert chosen.nbytes == local.nbytes
        differences = [prediction_difference(c.decode() - weight, x, g) for c in (chosen, local)]
        ratios.append(differences[0] / differences[1])
    assert max(ratios) < 1.0
    assert sum(ratios) / 3 < 0.9


def test_one_candidate_is_gptq() -> None:
    weight, statistics, _ = problem()
    alone = pd_quant(weight, statistics, group_size=32, candidates=(1.0,))
    plain = find("gptq").function(weight, statistics, bits=3, group_size=32)
    assert torch.equal(alone.decode(), plain.decode())


@pytest.mark.parametrize("scale_bits", [16, 6])
def test_the_code_is_the_rows_that_were_chosen(scale_bits: int) -> None:
    weight, statistics, _ = problem()
    options = {"group_size": 32, "scale_bits": scale_bits}
    mixed = pd_quant(weight, statistics, **options).decode()  # type: ignore[arg-type]
    factors = find("pd_quant").options["candidates"]
    single = [
        pd_quant(weight, statistics, candidates=(f,), **options).decode()  # type: ignore[arg-type]
        for f in factors
    ]
    taken = set()
    for row in range(OUT):
        nearest = [float((one[row] - mixed[row]).abs().max()) for one in single]
        taken.add(nearest.index(min(nearest)))
        assert min(nearest) < 1e-6
    assert len(taken) > 1


def test_every_step_of_the_descent_lowers_the_sum() -> None:
    torch.manual_seed(1)
    changes = torch.randn(4, 30, 50)
    rows = torch.arange(30)
    totals = [
        float(changes[choose_rows(changes, local=0.0, passes=n), rows].sum(0).square().sum())
        for n in (1, 2, 6)
    ]
    assert totals[0] < 0.5 * float(changes[0].sum(0).square().sum())
    assert totals[2] <= totals[1] <= totals[0]


def test_the_local_term_alone_takes_each_rows_own_best() -> None:
    torch.manual_seed(2)
    changes = torch.randn(4, 30, 50)
    chosen = choose_rows(changes, local=1e6)
    assert torch.equal(chosen, changes.square().sum(-1).argmin(0))


def test_a_recipe_can_name_it_and_missing_pairs_are_told() -> None:
    RungSpec(method="pd_quant", options={"bits": 2}).check()
    with pytest.raises(PliantError, match="observe"):
        pd_quant(torch.zeros(2, 2), Statistics(second_moment=torch.eye(2)))
    weight, statistics, _ = problem()
    with pytest.raises(PliantError, match="candidates"):
        pd_quant(weight, statistics, candidates=(0.0,))
