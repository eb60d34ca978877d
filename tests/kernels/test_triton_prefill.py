"""The product of many rows with group integers is that of the decoded matrix.

Without a GPU it runs in Triton's interpreter, integers widened in plain Triton.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from pliant.codes import GroupInt
from pliant.kernels import gpu
from pliant.kernels.cuda import build
from pliant.kernels.triton import prefill
from tests.kernels.group_codes import Form, group_code

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter multiplies bf16's bits as integers.
DTYPES = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]


@settings(max_examples=60 if DEVICE == "cuda" else 12, deadline=None)
@given(
    bits=st.sampled_from([1, 2, 4, 8]),
    units=st.integers(1, 5),
    unit=st.sampled_from([16, 32, 64]),
    per_group=st.sampled_from([0, 1, 2]),
    out=st.integers(1, 150),
    n=st.integers(1, 150),
    scale_bits=st.sampled_from([16, 6]),
    zeros=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_product_is_that_of_the_decoded_matrix(
    bits: int, units: int, unit: int, per_group: int, out: int, n: int, scale_bits: int,
    zeros: bool, dtype: torch.dtype,
) -> None:  # fmt: skip
    width = units * unit * 8 // bits
    code = group_code(Form(bits, False, unit * per_group, scale_bits, zeros), out, width)
    code = code.to(DEVICE)
    assert isinstance(code, GroupInt)
    assert prefill.takes(code)
    x = torch.randn(n, width + 8, device=DEVICE).to(dtype)[:, 8:]  # rows apart
    y = prefill.multiply(x, code, (64, 64), 4)
    weight = code.decode(torch.float32)
    exact = x.double() @ weight.double().t()
    rounded = x.double() @ weight.to(dtype).double().t()  # what decoding to x's dtype gives
    eps = torch.finfo(dtype).eps
    room = (rounded - exact).norm() + eps * exact.norm() + 1e-6
    assert (y.double() - exact).norm() <= 1.5 * room


@pytest.mark.parametrize(
    ("bits", "width", "group_size", "takes"),
    [
        (4, 576, 32, True), (4, 512, 0, True), (2, 512, 64, True), (8, 512, 64, True),
        (4, 512, 8, False), (4, 520, 0, False), (3, 512, 64, False), (4, 511, 0, False),
    ],
)  # fmt: skip
def test_which_codes_it_takes(bits: int, width: int, group_size: int, takes: bool) -> None:
    assert prefill.takes(group_code(Form(bits, False, group_size, 16, False), 3, width)) == takes
    assert not prefill.takes(group_code(Form(4, True, 64, 16, False), 3, 512))


@pytest.mark.parametrize("room", [227 << 10, 99 << 10, 48 << 10])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_its_tiles_fit_into_shared_memory(bits: int, room: int) -> None:
    code = group_code(Form(bits, False, 64, 16, False), 3, 512)
    assert isinstance(code, GroupInt)
    stages, inputs = prefill._depth(code, (128, 128), room)
    assert stages in (1, 2, 3)
    assert inputs in (16, 32, 64)
    assert stages * inputs * (128 + 2 * 128 * 8 // bits) <= room
    assert stages == 3 or (stages + 1) * inputs * (128 + 2 * 128 * 8 // bits) > room


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_field_is_moved_into_the_mantissa(bits: int) -> None:
    """The permutes, as the instruction is defined, give the integers above a power of two."""
    word = 0x9C3EB7D2
    for field in range(8 // bits):
        lines = prefill._assembly(bits).split(";")
        masked = (word >> (field * bits)) & (((1 << bits) - 1) * 0x01010101)
        for i, line in enumerate(part for part in lines if "prmt" in part):
            power, choice = (int(text) for text in line.split(",")[-2:])
            pool = masked.to_bytes(4, "little") + power.to_bytes(4, "little")
            moved = bytes(pool[choice >> (4 * k) & 7] for k in range(4))
            value = torch.frombuffer(bytearray(moved), dtype=torch.float32)
            expected = (word >> (8 * i) >> (field * bits)) & ((1 << bits) - 1)
            assert float(value) == expected + (32768 if bits == 8 else 128)


@pytest.mark.parametrize(
    ("n", "bits", "levels", "times"),
    [(64, 4, False, 0), (65, 4, False, 1), (70, 3, False, 0), (70, 4, True, 0)],
)
def test_prompts_take_it_where_it_takes_their_code(
    monkeypatch: pytest.MonkeyPatch, n: int, bits: int, levels: bool, times: int
) -> None:
    monkeypatch.setenv("PLIANT_GPU_KERNELS", "1")
    if DEVICE == "cpu":  # there is no CUDA kernel to decode with
        monkeypatch.setattr(build, "library", lambda *_: None)
    calls: list[int] = []
    multiply = prefill.multiply

    def counted(x: torch.Tensor, code: GroupInt) -> torch.Tensor:
        calls.append(len(x))
        return multiply(x, code)

    monkeypatch.setattr(prefill, "multiply", counted)
    code = group_code(Form(bits, levels, 64, 16, False), 33, 256).to(DEVICE)
    x = torch.randn(n, 256, device=DEVICE).half()
    y = gpu.group(x, code)
    assert len(calls) == times
    exact = x.double() @ code.decode(torch.float64).t()
    assert (y.double() - exact).norm() < 2e-3 * exact.norm()
