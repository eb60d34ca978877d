"""Rounded activations: the formats, and where in a composed code they are rounded."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from pliant.codes import Code, Dense, LowRank, Permuted, Rotated, Sparse, Sum
from pliant.errors import PliantError
from pliant.kernels import fake_quantize_activations, matmul, rounded_activations
from pliant.methods.quantize.llm_int8 import llm_int8
from pliant.observe.statistics import Statistics
from tests.codes.forms import group_int

torch.set_num_threads(1)
int4 = partial(fake_quantize_activations, bits=4)


@pytest.mark.parametrize("group_size", [-1, 0, 16, 24])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_integers_stay_within_half_a_step(bits: int, group_size: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 70)
    rounded = fake_quantize_activations(x, bits, group_size)
    top = 2 ** (bits - 1) - 1
    size = 70 if group_size <= 0 else group_size
    for part, original in zip(rounded.split(size, -1), x.split(size, -1), strict=True):
        over = original.abs().amax(-1, keepdim=True) if group_size >= 0 else x.abs().max()
        assert bool(((part - original).abs() <= 0.5001 * over / top).all())
    assert torch.equal(fake_quantize_activations(torch.zeros(2, 9), bits), torch.zeros(2, 9))
    assert fake_quantize_activations(x.half(), bits).dtype == torch.float16


def test_smaller_scopes_err_less() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 128) * torch.randn(64, 1).exp()
    x[:, 5] *= 30
    errors = [float((int4(x, group_size=g) - x).square().sum()) for g in (-1, 0, 32)]
    assert errors[0] > errors[1] > errors[2]


def test_fp8_has_three_bits_of_mantissa_at_every_size() -> None:
    x = torch.logspace(-2, 2, 400)[None]
    fp8 = fake_quantize_activations(x, floating=True)
    integers = fake_quantize_activations(x)
    assert float(((fp8 - x) / x).abs().max()) <= 2**-4 + 1e-6
    assert float(((integers - x) / x).abs().max()) > 0.5, "int8 loses what is small beside the peak"
    assert float(fp8.max()) == pytest.approx(float(x.max()))


def test_clipping_trades_the_peak_for_the_rest() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 4096)
    plain, clipped = int4(x), int4(x, clip=0.8)
    assert float(clipped.abs().max()) == pytest.approx(0.8 * float(x.abs().max()), rel=1e-5)
    assert float((clipped - x).square().mean()) < float((plain - x).square().mean())


@pytest.fixture(autouse=True)
def nothing_else_is_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLIANT_NATIVE", "exact")


def under(code: Code, x: Tensor) -> Tensor:
    with rounded_activations(int4):
        return matmul(x, code)


def test_a_leaf_meets_rounded_activations_and_the_context_ends() -> None:
    torch.manual_seed(0)
    code, x = group_int(6, 40), torch.randn(3, 40)
    torch.testing.assert_close(under(code, x), int4(x) @ code.decode().t())
    torch.testing.assert_close(matmul(x, code), x @ code.decode().t())


def test_rounding_comes_after_a_rotation() -> None:
    torch.manual_seed(0)
    inner, x = group_int(6, 64), torch.randn(3, 64)
    rotated = int4(Rotated.rotate(x, 3)) @ inner.decode().t()
    torch.testing.assert_close(under(Rotated(inner, 3), x), rotated)
    moved = Permuted.by(Rotated(inner, 3), torch.randperm(64))
    turned = int4(Rotated.rotate(moved.gather(x), 3)) @ inner.decode().t()
    torch.testing.assert_close(under(moved, x), turned)


def test_parts_in_16_bits_multiply_what_was_there() -> None:
    torch.manual_seed(0)
    x, dense = torch.randn(3, 40), torch.randn(6, 40).half()
    exact = [
        Dense(dense),
        Sparse.from_dense(torch.randn(6, 40), torch.rand(6, 40) < 0.1),
        LowRank.from_factors(torch.randn(6, 2), torch.randn(2, 40)),
    ]
    for code in exact:
        assert torch.equal(under(code, x), matmul(x, code))
    integer = group_int(6, 40)
    both = Sum((integer, exact[1]))
    torch.testing.assert_close(under(both, x), under(integer, x) + matmul(x, exact[1]))


def test_llm_int8_multiplies_outlier_channels_in_16_bits() -> None:
    """The decomposition is decisive once channels are amplified (the paper's figure 2)."""
    torch.manual_seed(0)
    weight, x = torch.randn(32, 96), torch.randn(64, 96)
    x[:, [3, 50]] *= 60
    statistics = Statistics(input_max=x.abs().amax(0))
    exact = x @ weight.t()
    errors = []
    for threshold in (6.0, 1e9):
        code = llm_int8(weight, statistics, threshold=threshold)
        with rounded_activations(fake_quantize_activations):
            errors.append(float((matmul(x, code) - exact).norm() / exact.norm()))
    assert errors[0] < 0.2 * errors[1]


def test_formats_that_do_not_exist_are_told() -> None:
    x = torch.zeros(1, 4)
    for options in ({"bits": 1}, {"bits": 17}, {"bits": 4, "floating": True}, {"clip": 0.0}):
        with pytest.raises(PliantError):
            fake_quantize_activations(x, **options)  # type: ignore[arg-type]
