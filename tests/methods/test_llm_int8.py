"""LLM.int8(): outlier channels exact, the rest int8 by row, and no byte beyond that."""

from __future__ import annotations

import pytest
import torch

from pliant.codes import Dense, GroupInt, Permuted
from pliant.errors import PliantError
from pliant.kernels import matmul
from pliant.methods.quantize.llm_int8 import llm_int8
from pliant.observe.statistics import Statistics

torch.set_num_threads(1)
OUTLIERS = [3, 40, 99]


def problem() -> tuple[torch.Tensor, Statistics, torch.Tensor]:
    torch.manual_seed(0)
    weight = (torch.randn(64, 100) * 0.05).half().float()
    x = torch.randn(256, 100)
    x[:, OUTLIERS] *= 40
    return weight, Statistics(input_max=x.abs().amax(0)), x


def test_outlier_channels_are_exact_and_the_rest_is_within_half_a_step() -> None:
    weight, statistics, _ = problem()
    code = llm_int8(weight, statistics)
    decoded = code.decode()
    assert torch.equal(decoded[:, OUTLIERS], weight[:, OUTLIERS])
    step = weight.abs().amax(1, keepdim=True) / 127
    assert bool(((decoded - weight).abs() <= 0.502 * step).all())
    assert not torch.equal(decoded, weight)


def test_bytes_are_those_of_both_parts_and_the_order() -> None:
    weight, statistics, _ = problem()
    code = llm_int8(weight, statistics)
    assert isinstance(code, Permuted)
    assert code.nbytes == 64 * 3 * 2 + 64 * 97 + 64 * 2 + 100


def test_the_decomposition_cuts_the_output_error() -> None:
    weight, statistics, x = problem()
    exact = x @ weight.T
    plain = (matmul(x, llm_int8(weight, statistics, threshold=1e9)) - exact).norm()
    split = (matmul(x, llm_int8(weight, statistics)) - exact).norm()
    assert float(split) < 0.3 * float(plain)


def test_weights_of_outlier_channels_do_not_widen_the_scale() -> None:
    weight, statistics, _ = problem()
    weight[:, OUTLIERS] *= 100
    kept = [i for i in range(100) if i not in OUTLIERS]
    error = (llm_int8(weight, statistics).decode() - weight)[:, kept].abs().max()
    coarse = (llm_int8(weight, statistics, threshold=1e9).decode() - weight)[:, kept].abs().max()
    assert float(error) < 0.05 * float(coarse)


def test_none_or_all_outliers() -> None:
    weight, statistics, _ = problem()
    assert isinstance(llm_int8(weight, statistics, threshold=1e9), GroupInt)
    everything = llm_int8(weight, statistics, threshold=0.0)
    assert isinstance(everything, Dense)
    assert torch.equal(everything.decode(), weight)


def test_missing_statistics_and_bad_bits_are_told() -> None:
    with pytest.raises(PliantError, match="largest"):
        llm_int8(torch.zeros(2, 2), Statistics())
    with pytest.raises(PliantError, match="bits"):
        llm_int8(torch.zeros(2, 2), Statistics(input_max=torch.ones(2)), bits=1)
