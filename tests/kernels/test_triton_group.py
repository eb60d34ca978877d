"""Triton's products with group codes are those with the decoded matrix, for any shape and form.

Without a GPU they run in Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from pliant.codes import GroupInt, GroupLevels, power_scales, quantize_scales
from pliant.kernels import gpu, reference
from pliant.kernels.triton import group
from tests.kernels.group_codes import Form, forms, group_code

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILE = (16, 16, 32)
ROUNDING = {torch.float32: 2e-6, torch.float16: 1e-3}
if DEVICE == "cuda":
    ROUNDING[torch.bfloat16] = 8e-3  # the interpreter multiplies bf16's bits as integers


def relative(y: Tensor, exact: Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm().clamp_min(1e-30))


@settings(max_examples=8, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    form=forms(),
    out=st.integers(1, 40),
    width=st.integers(1, 90),
    n=st.integers(1, 17),
    dtype=st.sampled_from(list(ROUNDING)),
    strided=st.booleans(),
)
def test_product_is_that_of_the_decoded_matrix(
    form: Form, out: int, width: int, n: int, dtype: torch.dtype, strided: bool
) -> None:
    code = group_code(form, out, width).to(DEVICE)
    assert isinstance(code, GroupInt | GroupLevels)
    x = torch.randn(width, n).t() if strided else torch.randn(n, width)
    x = x.to(DEVICE, dtype)
    y = group.multiply(x, code, TILE)
    assert y.dtype == dtype
    exact = x.double() @ code.decode(dtype).double().t()
    scale = (x.double().abs() @ code.decode().double().abs().t()).norm()
    assert float((y.double() - exact).norm() / scale.clamp_min(1e-30)) < ROUNDING[dtype]


@settings(max_examples=6, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    form=forms(),
    out=st.integers(1, 40),
    width=st.integers(1, 90),
    first=st.integers(0, 40),
    count=st.integers(0, 40),
)
def test_decoded_rows_are_those_of_the_code(
    form: Form, out: int, width: int, first: int, count: int
) -> None:
    code = group_code(form, out, width).to(DEVICE)
    assert isinstance(code, GroupInt | GroupLevels)
    rows = slice(first, first + count)
    decoded = group.decode(code, torch.float32, rows)
    torch.testing.assert_close(decoded, code.rows(rows), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("n", "out", "width"), [(0, 5, 8), (3, 0, 8), (3, 5, 0)])
def test_empty_products(n: int, out: int, width: int) -> None:
    scales = quantize_scales(torch.ones(out, -(-width // 8)))
    code = GroupInt.pack(torch.zeros(out, width, dtype=torch.long), scales, None, 4, 8)
    y = group.multiply(torch.ones(n, width, device=DEVICE), code.to(DEVICE))  # type: ignore[arg-type]
    assert y.shape == (n, out)
    assert not y.any()


def test_scales_that_are_powers_of_two() -> None:
    scales = power_scales(torch.randint(-9, 3, (20, 3)), 4, torch.rand(20) + 0.5)
    code = GroupLevels.pack(torch.randint(0, 8, (20, 90)), scales, torch.randn(1, 8), None, 3, 32)
    x = torch.randn(2, 90, device=DEVICE)
    y = group.multiply(x, code.to(DEVICE), TILE)  # type: ignore[arg-type]
    assert relative(y, x.double() @ code.decode(torch.float64).t().to(DEVICE)) < 1e-6


@pytest.mark.parametrize("n", [1, 3, 70])
@pytest.mark.parametrize("scratch", [2**28, 5000])
def test_what_is_registered_for_gpus(monkeypatch: pytest.MonkeyPatch, n: int, scratch: int) -> None:
    """Few rows decoded on the way, many decoded first, a tile of rows at a time."""
    monkeypatch.setenv("PLIANT_GPU_KERNELS", "1")
    monkeypatch.setattr(reference, "SCRATCH", scratch)
    monkeypatch.setattr(reference, "GPU_SCRATCH", scratch)
    code = group_code(Form(3, False, 32, 16, True), 37, 70).to(DEVICE)
    x = torch.randn(n, 70, device=DEVICE)
    y = gpu.group(x, code)
    assert relative(y, x.double() @ code.decode(torch.float64).t()) < 1e-6


def test_they_are_off_until_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PLIANT_GPU_KERNELS", raising=False)
    monkeypatch.setattr(group, "multiply", lambda *_: pytest.fail("the kernel ran"))
    code = group_code(Form(3, False, 32, 16, True), 37, 70)
    x = torch.randn(3, 70)
    assert torch.equal(gpu.group(x, code), reference.by_row_tiles(x, code))


def test_gradients_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLIANT_GPU_KERNELS", "1")
    code = group_code(Form(4, False, 32, 16, False), 9, 40).to(DEVICE)
    x = torch.randn(2, 40, device=DEVICE, requires_grad=True)
    gpu.group(x, code).sum().backward()
    torch.testing.assert_close(x.grad, code.decode().sum(0).expand(2, -1))
