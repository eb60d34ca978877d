"""Triton's products with codebooks and ternary codes, in its interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from pliant.codes import Codebook, LowRank, Signed, Ternary
from pliant.kernels import gpu, reference
from pliant.kernels.decoding import launched
from pliant.kernels.triton import group
from tests.codes.forms import group_int
from tests.kernels.test_triton_group import DEVICE, ROUNDING, TILE, relative


@st.composite
def indexed(draw: st.DrawFn) -> Codebook | Ternary:
    """Any width; groups that divide it, that do not, and one for a row; shared levels or own."""
    out, width = draw(st.integers(1, 40)), draw(st.integers(1, 90))
    torch.manual_seed(draw(st.integers(0, 99)))
    size = draw(st.sampled_from([width, 1, 7, 16, 32, 64]))
    size = min(size, width)
    groups = -(-width // size)
    if draw(st.booleans()):
        scales = torch.rand(out, groups) + 0.01
        trits = torch.randint(0, 3, (out, width))
        bits = draw(st.sampled_from([16, 4, 5, 6, 7, 8]))
        return Ternary.pack(trits, scales, size, bits).to(DEVICE)  # type: ignore[return-value]
    bits = draw(st.integers(1, 8))
    levels = torch.randn(draw(st.sampled_from([1, out])), groups, 2**bits)
    code = Codebook.pack(torch.randint(0, 2**bits, (out, width)), levels, bits, size)
    return code.to(DEVICE)  # type: ignore[return-value]


def ternary(out: int, width: int, group_size: int) -> Ternary:
    scales = torch.rand(out, -(-width // group_size)) + 0.01
    code = Ternary.pack(torch.randint(0, 3, (out, width)), scales, group_size)
    return code.to(DEVICE)  # type: ignore[return-value]


@settings(max_examples=12, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    code=indexed(),
    n=st.integers(0, 17),
    dtype=st.sampled_from(list(ROUNDING)),
    strided=st.booleans(),
)
def test_product_is_that_of_the_decoded_matrix(
    code: Codebook | Ternary, n: int, dtype: torch.dtype, strided: bool
) -> None:
    width = code.width
    x = torch.randn(width, n).t() if strided else torch.randn(n, width)
    x = x.to(DEVICE, dtype)
    y = group.multiply(x, code, TILE)
    assert y.dtype == dtype
    assert y.shape == (n, code.shape[0])
    exact = x.double() @ code.decode(dtype).double().t()
    scale = (x.double().abs() @ code.decode().double().abs().t()).norm()
    assert float((y.double() - exact).norm() / scale.clamp_min(1e-30)) < ROUNDING[dtype]


@settings(max_examples=15, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(code=indexed(), first=st.integers(0, 40), count=st.integers(0, 40))
def test_decoded_rows_are_those_of_the_code(
    code: Codebook | Ternary, first: int, count: int
) -> None:
    rows = slice(first, first + count)
    for dtype in (torch.float32, torch.float16):
        assert torch.equal(group.decode(code, dtype, rows), code.rows(rows, dtype))


def test_all_bytes_of_five_trits() -> None:
    trits = torch.cartesian_prod(*(torch.arange(3),) * 5).flatten()[None]
    code = Ternary.pack(trits, torch.ones(1, 1)).to(DEVICE)
    assert torch.equal(group.decode(code, torch.float32).cpu(), trits.float() - 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("n", [1, 3, 70])
@pytest.mark.parametrize("scratch", [2**28, 5000])
@pytest.mark.parametrize("make", [
    lambda: Codebook.pack(torch.randint(0, 8, (37, 70)), torch.randn(37, 3, 8), 3, 32),
    lambda: ternary(37, 70, 32),
    lambda: Signed.of(torch.rand(37, 70) < 0.5, LowRank.from_factors(
        torch.rand(37, 3), torch.rand(3, 70))),
    lambda: Signed.of(torch.rand(37, 70) < 0.5, group_int(37, 70)),
])  # fmt: skip
def test_what_is_registered_for_gpus(make, monkeypatch, n: int, scratch: int) -> None:
    """Few rows decoded on the way, many decoded first, a tile of rows at a time."""
    monkeypatch.setenv("PLIANT_GPU_KERNELS", "1")
    monkeypatch.setattr(reference, "GPU_SCRATCH", scratch)
    monkeypatch.setattr(reference, "SCRATCH", scratch)
    for name in ("by_row_tiles", "signed"):
        monkeypatch.setattr(reference, name, lambda *_: pytest.fail("not the kernel"))
    code = make().to(DEVICE)
    kernel = gpu.signed if isinstance(code, Signed) else gpu.indexed
    x = torch.randn(n, 70, device=DEVICE)
    assert relative(kernel(x, code), x.double() @ code.decode(torch.float64).t()) < 1e-6


def test_otherwise_the_reference_multiplies(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "multiply", lambda *_: pytest.fail("the kernel ran"))
    code = ternary(9, 40, 8)
    x = torch.randn(2, 40, device=DEVICE, requires_grad=why == "gradients")
    y = gpu.indexed(x, code)
    assert torch.equal(y, reference.by_row_tiles(x, code))
    if why == "gradients":
        y.sum().backward()
        torch.testing.assert_close(x.grad, code.decode().sum(0).expand(2, -1))


def test_signs_of_a_signed_code() -> None:
    positive = torch.rand(9, 21) < 0.5
    code = Signed.of(positive, group_int(9, 21)).to(DEVICE)
    assert isinstance(code, Signed)
    assert torch.equal(group.decode(group.signs(code), torch.float32).cpu() > 0, positive)
    assert torch.equal(launched(code), code.decode())
