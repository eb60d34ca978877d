"""The native kernels: every instruction set against decode-and-multiply."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pliant.codes import Code, Dense, GroupInt, GroupLevels, RowStack
from pliant.kernels import cpu, matmul
from pliant.kernels.cpu import build
from pliant.kernels.cpu.structs import Unsuited, describe
from tests.codes.forms import group_int, group_levels

EXACT, TWO_BYTES, ONE_BYTE = "exact", "", "int8"
TOLERANCE = {torch.float32: 2e-5, torch.float16: 6e-3, torch.bfloat16: 5e-2}
needs_native = pytest.mark.skipif(build.library() is None, reason="there is no C++ compiler")


def product(x: Tensor, code: Code, activations: str) -> Tensor:
    with pytest.MonkeyPatch.context() as patch, cpu.integer_activations():
        patch.setenv("PLIANT_NATIVE", activations)
        return matmul(x, code)


@needs_native
def test_one_byte_waits_until_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    code, x = group_int(5, 64), torch.randn(1, 64)
    monkeypatch.delenv("PLIANT_NATIVE", raising=False)
    plain = matmul(x, code)
    monkeypatch.setenv("PLIANT_NATIVE", "int8")
    assert torch.equal(matmul(x, code), plain)  # outside of `integer_activations`
    with cpu.integer_activations():
        assert not torch.equal(matmul(x, code), plain)
        monkeypatch.delenv("PLIANT_NATIVE")
        assert torch.equal(matmul(x, code), plain)
    monkeypatch.setenv("PLIANT_NATIVE", "exact")
    assert not torch.equal(matmul(x, code), plain)


@pytest.fixture(params=["plain", "avx2", "avx512"])
def isa(request):
    """Each instruction set that this machine has."""
    native = build.library()
    level = ["plain", "avx2", "avx512"].index(request.param)
    if native is None or native.pliant_use(level).decode() != request.param:
        pytest.skip(f"no {request.param} here")
    yield request.param
    native.pliant_use(2)


@st.composite
def leaves(draw: st.DrawFn, width: int) -> Code:
    out, kind = draw(st.integers(1, 21)), draw(st.sampled_from(["int", "levels", "dense"]))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    bits = draw(st.integers(1, 8))
    group = draw(st.sampled_from([16, 32, 48, 64, 96, 10_000]) | st.integers(1, 160))
    scale_bits = draw(st.sampled_from([16, 4, 5, 6, 7, 8]))
    if kind == "int":
        return group_int(out, width, bits, group, scale_bits, draw(st.booleans()))
    if kind == "levels":
        tables = draw(st.sampled_from([1, 2, 5, 40]))
        size = draw(st.sampled_from([16, 4, 6, 8]))
        return group_levels(out, width, bits, group, tables, draw(st.booleans()), size)
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    return Dense(torch.randn(out, width).to(dtype))


@st.composite
def codes(draw: st.DrawFn) -> Code:
    width = draw(st.integers(1, 150) | st.sampled_from([64, 128, 256, 576, 1000, 1536, 9000]))
    if draw(st.booleans()):
        return draw(leaves(width))
    return RowStack(tuple(draw(leaves(width)) for _ in range(3)))


def inputs(batch: int, width: int, dtype: torch.dtype, strided: bool) -> Tensor:
    x = torch.randn(width, batch).t() if strided else torch.randn(batch, width)
    return (x / width**0.5).to(dtype)


@needs_native
@settings(max_examples=150, deadline=None)
@given(codes(), st.integers(0, 17), st.sampled_from(list(TOLERANCE)), st.booleans(), st.data())
def test_exact_products_agree_with_the_decoded_matrix(code, batch, dtype, strided, data) -> None:
    native = build.library()
    assert native is not None
    native.pliant_use(data.draw(st.integers(0, 2)))
    describe(code)  # not the fallback
    x = inputs(batch, code.shape[1], dtype, strided)
    y = product(x, code, EXACT)
    native.pliant_use(2)
    assert y.dtype == dtype
    assert tuple(y.shape) == (batch, code.shape[0])
    if batch:
        decoded = code.decode().double()
        scale = float((x.double().abs() @ decoded.abs().T).max())
        error = float((y - x.double() @ decoded.T).abs().max())
        assert error <= TOLERANCE[dtype] * max(scale, 1.0)


def largest_levels(code: Code) -> Tensor:
    """Of each weight's table, times its scale [out, in]; 0 where there is none."""
    if isinstance(code, RowStack):
        return torch.cat([largest_levels(part) for part in code.parts])
    if not isinstance(code, GroupLevels):
        return torch.zeros(code.shape, dtype=torch.float64)
    largest = code.tables.double().abs().amax() * code.scales_as(torch.float64)
    return largest.repeat_interleave(code.group_size, 1)[:, : code.width]


def bound(x: Tensor, code: Code, top: int) -> Tensor:
    """How far products may be from exact ones when inputs and levels are integers up to `top`.

    Half a step of each; the low bytes of levels and of inputs do not meet.
    """
    padded = torch.nn.functional.pad(x.double().abs(), (0, -x.shape[1] % 32))
    peak = padded.unflatten(-1, (-1, 32)).amax(-1).repeat_interleave(32, -1)[:, : x.shape[1]]
    decoded, largest = code.decode().double().abs(), largest_levels(code)
    found = 0.501 / top * (peak @ decoded.T + (x.double().abs() + peak / top) @ largest.T)
    if top > 127:
        found = found + (128 / top) ** 2 * peak @ largest.T
    return found + 2e-5 * max(float((x.double().abs() @ decoded.T).max()), 1.0)


@needs_native
@settings(max_examples=200, deadline=None)
@given(codes(), st.integers(1, 17), st.sampled_from([TWO_BYTES, ONE_BYTE]), st.data())
def test_integer_products_err_by_half_a_step(code, batch, activations, data) -> None:
    native = build.library()
    assert native is not None
    native.pliant_use(data.draw(st.integers(0, 2)))
    x = inputs(batch, code.shape[1], torch.float32, False)
    y = product(x, code, activations)
    native.pliant_use(2)
    error = (y - x.double() @ code.decode().double().T).abs()
    assert bool((error <= bound(x, code, 127 if activations == ONE_BYTE else 127 * 256)).all())


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("width", "group"), [(576, 32), (576, 64), (192, 999), (333, 48)])
def test_two_bytes_are_as_good_as_float32(isa: str, bits: int, width: int, group: int) -> None:
    """Inputs of very different sizes, as norms and gates give them."""
    torch.manual_seed(bits)
    made: list[Code] = [group_int(64, width, bits, group, 16, zeros=bits % 2 == 0)]
    if bits <= 4:
        made.append(group_levels(64, width, bits, group, tables=4, size=6))
    x = torch.randn(3, width) * torch.randn(width).exp()
    for code in made:
        exact = x.double() @ code.decode().double().T
        error = product(x, code, TWO_BYTES) - exact
        assert float(error.norm() / exact.norm()) < (6e-5 if isinstance(code, GroupInt) else 1e-4)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 96, 128, 512, 9999])
@pytest.mark.parametrize("width", [32, 64, 96, 128, 576, 1024, 1088, 1536, 2080])
def test_rows_in_the_order_in_which_they_lie(bits: int, group: int, width: int) -> None:
    torch.manual_seed(width)
    code, x = group_int(11, width, bits, group, 16, zeros=False), torch.randn(5, width)
    exact = x.double() @ code.decode().double().T
    for activations, top in ((TWO_BYTES, 127 * 256), (ONE_BYTE, 127)):
        error = (product(x, code, activations) - exact).abs()
        assert bool((error <= bound(x, code, top)).all())


@pytest.mark.parametrize("bits", range(1, 9))
def test_integer_products_are_exact_where_inputs_are_integers(isa: str, bits: int) -> None:
    torch.manual_seed(bits)
    code = group_int(13, 576, bits, 32, 16, zeros=bits % 2 == 0)
    x = torch.randint(-127, 128, (1, 576)).float()
    x[:, ::32] = 127  # so that a step is 1
    y = product(x, code, ONE_BYTE)
    expected = x.double() @ code.decode().double().T
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=2e-2)


@pytest.mark.parametrize("bits", range(1, 8))
@pytest.mark.parametrize(
    ("width", "group"), [(64, 16), (576, 64), (576, 32), (1536, 32), (1536, 999)]
)
def test_planes_that_meet_in_registers(bits: int, width: int, group: int) -> None:
    torch.manual_seed(bits)
    x = torch.randn(2, width)
    made = [group_int(7, width, bits, group, 6)]
    if bits <= 4:
        made.append(group_levels(7, width, bits, group, tables=4, size=6))
    for code in made:
        decoded = code.decode()
        scale = float((x.abs() @ decoded.abs().T).max())
        for activations, most in ((ONE_BYTE, 2e-2), (TWO_BYTES, 1e-4)):
            y = product(x, code, activations)
            assert float((y - x @ decoded.T).abs().max()) <= most * scale


def test_what_is_not_a_number_stays_none(isa: str) -> None:
    code, x = group_int(5, 64), torch.randn(2, 64)
    x[1, 40] = float("inf")
    for activations in (EXACT, TWO_BYTES, ONE_BYTE):
        y = product(x, code, activations)
        assert bool(y[0].isfinite().all())
        assert not bool(y[1].isfinite().any())


@needs_native
def test_threads_share_the_rows() -> None:
    torch.manual_seed(0)
    code, x = group_int(501, 96), torch.randn(3, 96)
    before, one = torch.get_num_threads(), matmul(x, code)
    try:
        for threads in (2, 5, 1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(matmul(x, code), one)
    finally:
        torch.set_num_threads(before)


@needs_native
def test_tensors_that_are_not_laid_out_as_described_take_the_other_way() -> None:
    torch.manual_seed(0)
    code, x = group_int(6, 64), torch.randn(3, 64)
    strided = torch.stack([code.planes[0], code.planes[0]], -1)[..., 0]
    other = GroupInt((strided,), code.stored_scales, code.zeros, 64, 4, 32)
    short = GroupInt(code.planes, code.stored_scales, code.zeros, 66, 4, 32)
    with pytest.raises(Unsuited):
        describe(other)
    with pytest.raises(Unsuited):
        describe(short)
    torch.testing.assert_close(matmul(x, other), product(x, code, EXACT))


@needs_native
def test_a_selector_beyond_the_tables_reads_the_last(isa: str) -> None:
    torch.manual_seed(0)
    code = group_levels(4, 64, 3, 16, tables=3)
    beyond = tuple(torch.full_like(plane, 255) for plane in code.selector)
    wrong = GroupLevels(code.planes, code.stored_scales, code.tables, beyond, 64, 3, 16)
    for activations in (EXACT, TWO_BYTES, ONE_BYTE):
        assert bool(product(torch.randn(2, 64), wrong, activations).isfinite().all())


def test_gradients_go_through_torch() -> None:
    code, x = group_int(6, 64), torch.randn(3, 64, requires_grad=True)
    matmul(x, code).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, code.decode().sum(0).expand(3, -1))


def test_without_a_compiler_torch_does_it(monkeypatch, caplog, tmp_path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with caplog.at_level(logging.WARNING):
        assert build.library.__wrapped__() is None
    assert len(caplog.records) == 1
    assert "compiler" in caplog.text
    caplog.clear()
    monkeypatch.setenv("PLIANT_NATIVE", "0")
    assert build.library.__wrapped__() is None
    assert not caplog.records
