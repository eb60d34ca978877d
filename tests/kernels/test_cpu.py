"""The native kernels: every instruction set against decode-and-multiply."""

from __future__ import annotations

import logging
from collections.abc import Iterator

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

TOLERANCE = {torch.float32: 2e-5, torch.float16: 6e-3, torch.bfloat16: 5e-2}
needs_native = pytest.mark.skipif(build.library() is None, reason="there is no C++ compiler")


@pytest.fixture(autouse=True, scope="module")
def asked_for_integers() -> Iterator[None]:
    """What `integer_activations` waits for; products outside of it stay in 32 bits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLIANT_NATIVE", "int8")
        yield


@needs_native
def test_integers_wait_until_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    code, x = group_int(5, 64), torch.randn(1, 64)
    plain = matmul(x, code)
    with cpu.integer_activations():
        assert not torch.equal(matmul(x, code), plain)
        monkeypatch.delenv("PLIANT_NATIVE")
    with cpu.integer_activations():
        assert torch.equal(matmul(x, code), plain)


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
    y = matmul(x, code)
    native.pliant_use(2)
    assert y.dtype == dtype
    assert tuple(y.shape) == (batch, code.shape[0])
    if batch:
        decoded = code.decode().double()
        scale = float((x.double().abs() @ decoded.abs().T).max())
        error = float((y - x.double() @ decoded.T).abs().max())
        assert error <= TOLERANCE[dtype] * max(scale, 1.0)


def levels_err_by(code: Code) -> Tensor:
    """Half a step of levels as integers of 8 bits, of each weight."""
    if isinstance(code, RowStack):
        return torch.cat([levels_err_by(part) for part in code.parts])
    if not isinstance(code, GroupLevels):
        return torch.zeros(code.shape, dtype=torch.float64)
    step = code.tables.double().abs().amax() / 127 * code.scales_as(torch.float64)
    return 0.501 * step.repeat_interleave(code.group_size, 1)[:, : code.width]


@needs_native
@settings(max_examples=150, deadline=None)
@given(codes(), st.integers(1, 17), st.data())
def test_integer_products_err_by_half_a_step_of_their_inputs(code, batch, data) -> None:
    native = build.library()
    assert native is not None
    native.pliant_use(data.draw(st.integers(0, 2)))
    x = inputs(batch, code.shape[1], torch.float32, False)
    with cpu.integer_activations():
        y = matmul(x, code)
    native.pliant_use(2)
    decoded = code.decode().double()
    padded = torch.nn.functional.pad(x.double().abs(), (0, -x.shape[1] % 32))
    step = padded.unflatten(-1, (-1, 32)).amax(-1).repeat_interleave(32, -1)[:, : x.shape[1]] / 127
    bound = 0.501 * step @ decoded.abs().T + (x.double().abs() + step) @ levels_err_by(code).T
    scale = float((x.double().abs() @ decoded.abs().T).max())
    assert bool(((y - x.double() @ decoded.T).abs() <= bound + 2e-5 * max(scale, 1.0)).all())


@pytest.mark.parametrize("bits", range(1, 9))
def test_integer_products_are_exact_where_inputs_are_integers(isa: str, bits: int) -> None:
    torch.manual_seed(bits)
    code = group_int(13, 576, bits, 32, 16, zeros=bits % 2 == 0)
    x = torch.randint(-127, 128, (1, 576)).float()
    x[:, ::32] = 127  # so that a step is 1
    with cpu.integer_activations():
        y = matmul(x, code)
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
        with cpu.integer_activations():
            y = matmul(x, code)
        decoded = code.decode()
        scale = float((x.abs() @ decoded.abs().T).max())
        assert float((y - x @ decoded.T).abs().max()) <= 2e-2 * scale


def test_what_is_not_a_number_stays_none(isa: str) -> None:
    code, x = group_int(5, 64), torch.randn(2, 64)
    x[1, 40] = float("inf")
    with cpu.integer_activations():
        y = matmul(x, code)
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
    torch.testing.assert_close(matmul(x, other), matmul(x, code))


@needs_native
def test_a_selector_beyond_the_tables_reads_the_last(isa: str) -> None:
    torch.manual_seed(0)
    code = group_levels(4, 64, 3, 16, tables=3)
    beyond = tuple(torch.full_like(plane, 255) for plane in code.selector)
    wrong = GroupLevels(code.planes, code.stored_scales, code.tables, beyond, 64, 3, 16)
    assert bool(matmul(torch.randn(2, 64), wrong).isfinite().all())


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
