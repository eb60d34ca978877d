"""Feedback over any grid: the affine one gives GPTQ's integers, levels give less error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pliant.errors import PliantError
from pliant.methods import feedback as module
from pliant.methods.feedback import round_columns, round_levels
from pliant.methods.grid import fit_grid
from pliant.methods.levels import fit_levels, integer_levels, minifloat_levels
from pliant.methods.numerics import weighted_error
from pliant.methods.quantize.gptq import inverse_factor, round_with_feedback
from pliant.observe.statistics import Statistics
from tests.methods.problems import problem

torch.set_num_threads(1)

TABLES = torch.stack([minifloat_levels(2, 0), integer_levels(3)])


def moment_of(statistics: Statistics) -> Tensor:
    assert statistics.second_moment is not None
    return statistics.second_moment


def test_an_affine_grid_gets_the_integers_of_gptq() -> None:
    weight, statistics = problem()
    factor, order = inverse_factor(moment_of(statistics), damp=0.1)
    grid = fit_grid(weight, 3, 32)
    scales, zeros = grid.scales.t(), grid.zeros.t()

    def nearest(column: Tensor, group: int) -> tuple[Tensor, Tensor]:
        q = (column / scales[group] + zeros[group]).round().clamp(0, grid.top)
        return q.to(torch.uint8), (q - zeros[group]) * scales[group]

    columns = weight.t()[order].contiguous()
    chosen = round_columns(columns, (order // 32).tolist(), factor, nearest)
    expected = round_with_feedback(weight, grid, factor, order)
    differ = chosen[torch.argsort(order)].t() != expected
    assert float(differ.float().mean()) < 0.005


@pytest.mark.parametrize("tables", [TABLES, TABLES[:1], integer_levels(4)[None]])
@pytest.mark.parametrize("scaling", ["free", "power", "ratio"])
@pytest.mark.parametrize("act_order", [True, False])
def test_beats_rounding_at_the_outputs(tables: Tensor, scaling, act_order: bool) -> None:
    weight, statistics = problem()
    moment = moment_of(statistics)
    bits = 16 if scaling == "free" else 4
    grid = fit_levels(
        weight, tables, 32, importance=moment.diagonal(), scaling=scaling, scale_bits=bits
    )
    code = round_levels(weight, statistics, grid, damp=0.01, act_order=act_order)
    plain = grid.round(weight)
    assert code.nbytes == plain.nbytes
    errors = [weighted_error(c.decode() - weight, moment) for c in (code, plain)]
    assert errors[0] < 0.8 * errors[1]
    assert (code.decode() - weight).norm() > (plain.decode() - weight).norm()


@pytest.mark.parametrize("width", [1, 5, 63, 130])
@pytest.mark.parametrize("group_size", [0, 16, 999])
def test_inputs_without_correlation_leave_rounding(width: int, group_size: int) -> None:
    weight, _ = problem(out=6, width=width)
    diagonal = torch.rand(width, generator=torch.Generator().manual_seed(2)) + 0.1
    statistics = Statistics(tokens=1, second_moment=torch.diag(diagonal))
    grid = fit_levels(weight, TABLES, group_size)
    code = round_levels(weight, statistics, grid, damp=0.1, act_order=True)
    assert torch.equal(code.decode(), grid.round(weight).decode())


def test_blocks_and_tiles_do_not_change_the_indices(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, statistics = problem(out=200)
    grid = fit_levels(weight, TABLES, 32)
    whole = round_levels(weight, statistics, grid, damp=0.1, act_order=True).indices()
    monkeypatch.setattr("pliant.methods.quantize.gptq._TILE_BYTES", 1)
    for block in (1, 7, 500):
        monkeypatch.setattr(module, "_BLOCK", block)
        again = round_levels(weight, statistics, grid, damp=0.1, act_order=True).indices()
        assert float((again != whole).float().mean()) < 0.005


def test_places_are_those_of_the_permuted_problem() -> None:
    """Sorting the grid's columns is the same as sorting weight and moment alike."""
    weight, statistics = problem()
    order = torch.randperm(128, generator=torch.Generator().manual_seed(4))
    moment = moment_of(statistics)[order][:, order]
    permuted = weight[:, order].contiguous()
    grid = fit_levels(permuted, TABLES, 32)
    expected = round_levels(
        permuted, Statistics(tokens=1, second_moment=moment), grid, damp=0.1, act_order=True
    )
    place = torch.argsort(order)
    code = round_levels(weight, statistics, grid, damp=0.1, act_order=True, place=place)
    assert float((code.indices() != expected.indices()).float().mean()) < 0.005


def test_without_a_second_moment_it_says_what_is_missing() -> None:
    weight, _ = problem()
    with pytest.raises(PliantError, match="second moment"):
        round_levels(weight, Statistics(), fit_levels(weight, TABLES, 32), damp=0.1, act_order=True)
