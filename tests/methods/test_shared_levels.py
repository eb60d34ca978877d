"""Shared levels: tables that fit the matrix they were learned for, within counted bytes."""

from __future__ import annotations

import pytest
import torch

from pliant.codes import GroupLevels
from pliant.codes.packing import packed_nbytes
from pliant.errors import PliantError
from pliant.kernels.cuda.decode import level_digits
from pliant.methods import find
from pliant.methods.latent import latent_of
from pliant.methods.levels import fit_levels
from pliant.methods.numerics import weighted_error
from pliant.methods.quantize.shared_levels import first_tables, learn_tables, shared_levels
from pliant.observe import Statistics
from tests.methods.problems import problem

torch.set_num_threads(1)


def error(code: GroupLevels, weight: torch.Tensor, statistics: Statistics) -> float:
    assert statistics.second_moment is not None
    return weighted_error(code.decode() - weight, statistics.second_moment)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_less_error_than_gptq_in_no_more_bytes(bits: int) -> None:
    weight, statistics = problem(out=192, width=256)
    ours = shared_levels(weight, statistics, bits=bits)
    theirs = find("gptq").function(weight, statistics, bits=bits, group_size=64, scale_bits=6)
    tables = ours.tables.nbytes  # of a matrix this small they are a larger share
    assert ours.nbytes - tables <= theirs.nbytes
    assert error(ours, weight, statistics) < 0.97 * error(theirs, weight, statistics)


@pytest.mark.parametrize("bits", [2, 3])
def test_every_round_of_learning_lowers_the_loss(bits: int) -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    weight = weight + 0.6 * weight.square()  # lopsided
    losses = [
        fit_levels(weight, learn_tables(weight, None, bits, 32, 3, rounds), 32).loss
        for rounds in (0, 1, 3, 6)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]


def test_tables_are_found_that_the_weights_were_made_of() -> None:
    generator = torch.Generator().manual_seed(1)
    made = torch.tensor([[-1.0, -0.2, 0.3, 1.0], [-1.0, -0.8, 0.1, 0.5]])
    of = torch.randint(2, (64, 8), generator=generator)
    index = torch.randint(4, (64, 8, 32), generator=generator)
    index[..., :4] = torch.arange(4)  # every group spans its table
    scale = torch.rand(64, 8, 1, generator=generator) + 0.5
    weight = (made[of].gather(-1, index) * scale).flatten(1)
    learned = learn_tables(weight, None, 2, 32, 2, 12, clip=False)
    loss = fit_levels(weight, learned, 32, clip=False).loss
    assert loss < 0.01 * fit_levels(weight, first_tables(2, 2), 32, clip=False).loss


def test_bytes_are_indices_selectors_scales_and_tables() -> None:
    weight, statistics = problem(out=24, width=70)
    code = shared_levels(weight, statistics, bits=3, tables=4, group_size=32)
    groups = 3
    assert code.nbytes == (
        packed_nbytes(24, 70, 3) + packed_nbytes(24, groups, 2)
        + packed_nbytes(24, groups, 6) + 2 * 24 + 2 * 4 * 8
    )  # fmt: skip


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_levels_are_of_one_digit_and_stay_so_when_trained(bits: int) -> None:
    weight, statistics = problem(out=32, width=128)
    lopsided = weight + 2 * weight.square()
    code = shared_levels(lopsided, statistics, bits=bits)
    assert level_digits(code) == 1
    latent = latent_of(code, lopsided)
    assert latent is not None
    with torch.no_grad():
        latent.position += 0.3 * torch.randn_like(latent.position)
        latent.log_scale += 0.1
    trained = latent.encode()
    assert isinstance(trained, GroupLevels)
    assert not torch.equal(trained.indices(), code.indices())
    assert torch.equal(trained.tables, code.tables)


@pytest.mark.parametrize(("bits", "most"), [(2, 1.003), (3, 1.006), (4, 1.02)])
def test_whole_levels_cost_little(bits: int, most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against levels of fp16, learned alike."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(256, 512, generator=generator)
    weight = weight + 0.2 * weight.square()
    losses = []
    for whole in (4, 0):
        monkeypatch.setattr("pliant.methods.quantize.shared_levels._BYTE_BITS", whole)
        tables = learn_tables(weight, None, bits, 64, 4, 6)
        losses.append(float(fit_levels(weight, tables, 64).loss))
    assert losses[0] < most * losses[1]


def test_feedback_lowers_the_error_at_the_outputs() -> None:
    weight, statistics = problem(out=96, width=128)
    with_feedback = shared_levels(weight, statistics)
    without = shared_levels(weight, statistics, feedback=False)
    assert error(with_feedback, weight, statistics) < error(without, weight, statistics)


def test_wrong_options_are_told() -> None:
    with pytest.raises(PliantError, match="1 to 6 bits"):
        shared_levels(torch.randn(8, 8), Statistics(), bits=7)
