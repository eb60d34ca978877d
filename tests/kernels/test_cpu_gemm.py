"""Many inputs at once: every instruction set against decode-and-multiply."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pliant.codes import Code, Dense, GroupLevels, RowStack
from pliant.kernels import cpu, matmul
from pliant.kernels.cpu import build
from pliant.kernels.cpu.structs import describe
from tests.codes.forms import group_int, group_levels

from .test_cpu import codes, inputs

pytestmark = pytest.mark.skipif(build.library() is None, reason="there is no C++ compiler")

MOST_INPUT, MOST_LEVEL = 16383, 4095
OF_DTYPE = {torch.float32: 2e-5, torch.float16: 6e-3, torch.bfloat16: 5e-2}


@pytest.fixture(params=[0, 1, 2], ids=["plain", "avx2", "avx512"])
def isa(request):
    native = build.library()
    name = native.pliant_use(request.param).decode()
    if name != ["plain", "avx2", "avx512"][request.param]:
        native.pliant_use(2)
        pytest.skip(f"level {request.param} is not here")
    yield native
    native.pliant_use(2)


def rounding_of(code: Code) -> Tensor:
    """By how much each weight may differ from its code's: half a step of rounded levels."""
    if isinstance(code, RowStack):
        return torch.cat([rounding_of(part) for part in code.parts])
    if not isinstance(code, GroupLevels):
        return torch.zeros(code.shape, dtype=torch.float64)
    step = code.tables.double().abs().amax() / MOST_LEVEL * code.scales_as(torch.float64).abs()
    return 0.501 * step.repeat_interleave(code.group_size, 1)[:, : code.width]


def errs_no_more_than_its_inputs(y: Tensor, x: Tensor, code: Code, more: float = 2e-5) -> None:
    decoded, exact = code.decode().double(), x.double()
    spans = torch.nn.functional.pad(exact.abs(), (0, -x.shape[1] % 32)).unflatten(-1, (-1, 32))
    step = spans.amax(-1).repeat_interleave(32, -1)[:, : x.shape[1]] / MOST_INPUT
    bound = 0.501 * step @ decoded.abs().T + (exact.abs() + step) @ rounding_of(code).T
    scale = float((exact.abs() @ decoded.abs().T).max())
    assert bool(((y - exact @ decoded.T).abs() <= bound + more * max(scale, 1.0)).all())


@settings(max_examples=120, deadline=None)
@given(codes(), st.integers(17, 300), st.sampled_from(list(OF_DTYPE)), st.booleans(), st.data())
def test_products_err_by_half_a_step_of_their_inputs(code, batch, dtype, strided, data) -> None:
    native = build.library()
    assert native is not None
    native.pliant_use(data.draw(st.integers(0, 2)))
    x = inputs(batch, code.shape[1], dtype, strided)
    y = matmul(x, code)
    native.pliant_use(2)
    assert y.dtype == dtype
    assert tuple(y.shape) == (batch, code.shape[0])
    errs_no_more_than_its_inputs(y, x, code, OF_DTYPE[dtype])


@settings(max_examples=60, deadline=None)
@given(codes(), st.integers(1, 70), st.integers(0, 2))
def test_the_native_product_is_right_where_torch_is_faster_too(code, batch, level) -> None:
    native = build.library()
    assert native is not None
    native.pliant_use(level)
    x = inputs(batch, code.shape[1], torch.float32, False)
    y = cpu._words(native, x, describe(code))
    native.pliant_use(2)
    errs_no_more_than_its_inputs(y, x, code)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("group", [16, 32, 48, 999])
def test_integers_are_multiplied_exactly(isa, bits: int, group: int) -> None:
    torch.manual_seed(bits)
    code = group_int(29, 144, bits, group, 16, zeros=bits % 2 == 0)
    x = torch.randint(-MOST_INPUT, MOST_INPUT + 1, (40, 144)).float()
    x[:, ::32] = MOST_INPUT  # so that a step is 1
    y = cpu._words(isa, x, describe(code))
    expected = x.double() @ code.decode().double().T
    scale = float((x.abs().double() @ code.decode().abs().double().T).max())
    assert float((y - expected).abs().max()) <= 1e-6 * scale


@pytest.mark.parametrize("bits", [4, 8])
def test_the_largest_of_everything_does_not_overflow(isa, bits: int) -> None:
    integers = group_int(13, 320, bits, 320, 16)
    levels = group_levels(13, 320, bits, 320)
    x = torch.full((20, 320), 3.0)
    for code in (integers, levels):
        top = type(code).pack(
            torch.full((13, 320), 2**bits - 1),
            code.stored_scales,
            *((None,) if code is integers else (torch.ones(1, 2**bits), None)),
            bits,
            320,
        )
        errs_no_more_than_its_inputs(cpu._words(isa, x, describe(top)), x, top)


def test_what_is_not_a_number_stays_with_its_token(isa) -> None:
    for code in (group_int(30, 96), group_levels(30, 96, 3), Dense(torch.randn(30, 96))):
        x = torch.randn(40, 96)
        x[7, 40], x[33, 2] = float("inf"), float("nan")
        y = cpu._words(isa, x, describe(code))
        finite = y.isfinite()
        assert not bool(finite[[7, 33]].any())
        assert bool(finite[[i for i in range(40) if i not in (7, 33)]].all())


def test_inputs_of_any_size_keep_their_digits(isa) -> None:
    torch.manual_seed(0)
    code = group_int(30, 128)
    for size in (0.0, 1e-20, 1e-6, 1e6, 1e20):
        x = torch.randn(40, 128) * size
        x[:, 96:] *= 1e-4  # another span's scale
        y = cpu._words(isa, x, describe(code)).double()
        expected = x.double() @ code.decode().double().T
        assert float((y - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


def test_threads_share_the_tiles() -> None:
    torch.manual_seed(0)
    code, x = group_int(501, 96), torch.randn(70, 96)
    before, one = torch.get_num_threads(), matmul(x, code)
    try:
        for threads in (2, 5, 1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(matmul(x, code), one)
    finally:
        torch.set_num_threads(before)


def test_more_inputs_than_a_piece_are_the_same_as_one_piece_after_the_other() -> None:
    torch.manual_seed(0)
    code, x = group_int(50, 96), torch.randn(2 * cpu.PIECE + 19, 96)
    together = matmul(x, code)
    for part, expected in zip(x.split(cpu.PIECE), together.split(cpu.PIECE), strict=True):
        assert torch.equal(cpu._words(build.library(), part, describe(code)), expected)
    assert matmul(x[:0], code).shape == (0, 50)
