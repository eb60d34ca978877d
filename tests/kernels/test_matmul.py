"""Every kernel against decode-and-multiply."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pliant.codes import Code, Codebook, Dense, GroupInt, LowRank, Signed
from pliant.errors import PliantError
from pliant.kernels import cpu, matmul, reference, register
from pliant.kernels.dispatch import _KERNELS
from tests.codes.forms import codes, group_int, integers

TOLERANCE = {torch.float32: 2e-5, torch.float16: 6e-3, torch.bfloat16: 5e-2}


@settings(max_examples=200, deadline=None)
@given(codes(), st.integers(0, 17), st.sampled_from(list(TOLERANCE)), st.booleans())
def test_matmul_agrees_with_the_decoded_matrix(
    code: Code, batch: int, dtype: torch.dtype, strided: bool
) -> None:
    out, width = code.shape
    x = torch.randn(width, batch).t() if strided else torch.randn(batch, width)
    x = (x / width**0.5).to(dtype)
    y = matmul(x, code)
    assert y.dtype == dtype
    assert tuple(y.shape) == (batch, out)
    exact = x.double() @ code.decode().double().T
    scale = float((x.double().abs() @ code.decode().double().abs().T).max()) if batch else 1.0
    assert float((y - exact).abs().max() if batch else 0) <= TOLERANCE[dtype] * max(scale, 1.0)


def test_leading_dimensions_are_kept() -> None:
    code = group_int(6, 40)
    x = torch.randn(2, 2, 4, 40)
    exact = x @ code.decode().T
    assert (matmul(x, code) - exact).norm() < 1e-4 * exact.norm()
    assert matmul(x[0, 0, 0], code).shape == (6,)
    assert matmul(torch.empty(2, 0, 40), code).shape == (2, 0, 6)


@pytest.mark.parametrize("inputs", [1, 3, 40])
def test_signed_factors_with_few_inputs_and_with_many(inputs: int) -> None:
    factors = LowRank.from_factors(torch.randn(4000, 3), torch.randn(3, 90))
    code = Signed.of(torch.rand(4000, 90) < 0.5, factors)
    x = torch.randn(inputs, 90)
    torch.testing.assert_close(matmul(x, code), x @ code.decode().T, rtol=1e-4, atol=1e-4)


def test_a_wrong_width_is_told() -> None:
    with pytest.raises(PliantError, match="41"):
        matmul(torch.zeros(1, 41), group_int(6, 40))


@pytest.mark.parametrize("make", [
    lambda: group_int(9001, 96),
    lambda: Codebook.pack(integers(8, 9001, 96), torch.randn(9001, 1, 8), 3),
    lambda: Dense(torch.randn(9001, 96).half()),
])  # fmt: skip
def test_tall_matrices_are_decoded_in_bounded_tiles(make, monkeypatch) -> None:
    monkeypatch.setattr(cpu, "library", lambda: None)
    code, sizes = make(), []
    name = "rows_into" if hasattr(code, "rows_into") else "rows"
    decode = getattr(type(code), name)

    def spy(self, *args):
        tile = decode(self, *args)
        sizes.append(tile.nbytes)
        return tile

    monkeypatch.setattr(type(code), name, spy)
    y = matmul(torch.randn(2, 96), code)
    assert y.shape == (2, 9001)
    assert len(sizes) > 1
    assert max(sizes) <= reference.SCRATCH <= 4 * 2**20


def test_a_registered_kernel_is_used_on_its_device_only() -> None:
    before = dict(_KERNELS)
    try:
        register(GroupInt, "cpu")(lambda x, code: x.new_full((x.shape[0], code.shape[0]), 7.0))
        register(GroupInt, "cuda")(lambda x, code: x.new_full((x.shape[0], code.shape[0]), 8.0))
        assert matmul(torch.zeros(1, 40), group_int(6, 40)).tolist() == [[7.0] * 6]
    finally:
        _KERNELS.clear()
        _KERNELS.update(before)
