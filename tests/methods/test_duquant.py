"""DuQuant: nothing changes before rounding, and outliers go down step by step."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from pliant.codes import BlockRotated, Dense, Permuted, Rotated
from pliant.codes.block_rotated import apply_blocks
from pliant.errors import PliantError
from pliant.fit.recipe import RungSpec
from pliant.kernels import fake_quantize_activations, matmul, rounded_activations
from pliant.methods.quantize import duquant as module
from pliant.methods.quantize.duquant import _spreading, duquant, rotations, zigzag
from pliant.methods.quantize.rtn import rtn
from pliant.observe.statistics import Statistics

torch.set_num_threads(1)


def problem(width: int = 576, tokens: int = 96) -> tuple[Tensor, Tensor, Statistics]:
    """Normal outliers in some channels of all tokens, massive ones in a few of one token."""
    torch.manual_seed(0)
    x = torch.randn(tokens, width)
    x[:, 5::97] *= 8
    x[7, torch.tensor([width - 3, 40, 41]) % width] = torch.tensor([700.0, 500.0, -400.0])
    weight = torch.randn(48, width)
    moment = x.t() @ x / tokens
    statistics = Statistics(
        tokens, moment, x.abs().amax(0), inputs=x, gradients=torch.zeros(tokens, 48)
    )
    return weight, x, statistics


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("width", [64, 70, 576])
def test_before_rounding_nothing_changes(
    width: int, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, x, statistics = problem(width)
    monkeypatch.setattr(module, "base_code", lambda w, *_: Dense(w))
    code = duquant(weight, statistics, block=16, shared=shared)
    torch.testing.assert_close(code.decode(), weight, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(matmul(x, code), x @ weight.t(), rtol=1e-4, atol=2e-2)


def test_peaks_and_spread_of_blocks_fall_from_none_to_hadamard_to_duquant() -> None:
    weight, x, statistics = problem()
    code = duquant(weight, statistics, base="rtn")
    assert isinstance(code, BlockRotated)
    assert isinstance(code.inner, Permuted)
    assert isinstance(code.inner.inner, BlockRotated)
    turned = code.inner.inner.rotate(code.inner.gather(code.rotate(x)))
    views = [x, Rotated.rotate(x, 0), turned]
    peaks = [float(v.abs().max()) for v in views]
    # variance over blocks of 32 of the blocks' energy: how unevenly outliers are dealt out
    uneven = [float(v.view(len(v), -1, 32).square().mean((0, 2)).var()) for v in views]
    assert peaks[0] > 3 * peaks[1] > 3 * peaks[2]
    assert uneven[0] > uneven[1] > uneven[2]


def test_four_bit_activations_err_less_in_the_same_order() -> None:
    weight, x, statistics = problem()
    codes = [
        rtn(weight, Statistics(), bits=8),
        Rotated(rtn(Rotated.rotate(weight, 0), Statistics(), bits=8), 0),
        duquant(weight, statistics, base="rtn", bits=8),
    ]
    exact = x @ weight.t()
    with rounded_activations(partial(fake_quantize_activations, bits=4)):
        errors = [float((matmul(x, code) - exact).norm()) for code in codes]
    assert errors[0] > errors[1] > errors[2]


def test_zigzag_deals_alike_and_keeps_the_smallest_for_the_tail() -> None:
    peaks = torch.arange(70.0).flip(0)
    order = zigzag(peaks, 16)
    assert order[:64].view(4, 16)[:, :3].tolist() == [[0, 7, 8], [1, 6, 9], [2, 5, 10], [3, 4, 11]]
    assert order.sort().values.tolist() == list(range(70))
    assert order[64:].tolist() == list(range(64, 70))
    sums = peaks[order[:64]].view(4, 16).sum(1)
    assert float(sums.max() - sums.min()) == 0


def test_rotations_are_orthogonal_and_never_raise_the_peaks() -> None:
    _, x, _ = problem(70)
    for size in (16, 20):
        spread = _spreading(size, torch.Generator().manual_seed(3))
        torch.testing.assert_close(spread @ spread.t(), torch.eye(size), rtol=0, atol=1e-5)
        torch.testing.assert_close(spread[0].abs(), torch.full((size,), size**-0.5))
    levels = []
    for steps in (1, 4, 32):
        blocks, tail = rotations(x, 16, steps, 0, False)
        for turn in (*blocks.float(), tail.float()):
            torch.testing.assert_close(turn @ turn.t(), torch.eye(len(turn)), rtol=0, atol=3e-3)
        turned = apply_blocks(x, blocks, tail)[:, :64].view(len(x), 4, 16)
        levels.append(float(turned.abs().amax(2).square().mean()))
    assert levels[0] >= levels[1] >= levels[2]


def test_a_massive_token_that_the_sample_missed_counts() -> None:
    weight, x, statistics = problem()
    rest = torch.cat([x[:7], x[8:]])
    without = Statistics(95, statistics.second_moment, statistics.input_max, inputs=rest,
                         gradients=torch.zeros(95, 48))  # fmt: skip
    code = duquant(weight, without, base="rtn")
    assert isinstance(code, BlockRotated)
    assert isinstance(code.inner, Permuted)
    assert isinstance(code.inner.inner, BlockRotated)
    turned = code.inner.inner.rotate(code.inner.gather(code.rotate(x[7])))
    assert float(turned.abs().max()) < 0.2 * float(x[7].abs().max())


def test_its_bytes_and_its_place_in_a_recipe() -> None:
    weight, _, statistics = problem()
    code = duquant(weight, statistics, base="rtn", bits=4, block=16)
    assert code.nbytes == rtn(weight, Statistics(), bits=4).nbytes + 2 * 2 * 16**2 + 2 * 576
    own = duquant(weight, statistics, base="rtn", bits=4, block=16, shared=False)
    assert own.nbytes == rtn(weight, Statistics(), bits=4).nbytes + 2 * 2 * 16 * 576 + 2 * 576
    RungSpec(method="duquant", options={"base": "gptq", "bits": 4, "scale_bits": 6}).check()
    with pytest.raises(PliantError, match="observe"):
        duquant(torch.zeros(2, 2), Statistics())
