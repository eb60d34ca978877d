"""Activations turned, gathered and scaled by Triton, in its interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from pliant.codes import Code, Permuted, Rotated, Scaled
from pliant.codes.block_rotated import apply_blocks
from pliant.codes.indices import compact
from pliant.kernels import cpu, dispatch, gpu, matmul
from pliant.kernels.decoding import launched
from pliant.kernels.triton import rotate
from tests.codes.forms import codes, group_int
from tests.kernels.test_triton_group import DEVICE

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PRECISION = 1e-6  # of work in float32
ROUNDING = {torch.float32: 0.0, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def random_x(n: int, width: int, dtype: torch.dtype, strided: bool) -> Tensor:
    x = torch.randn(width, n).t() if strided else torch.randn(n, width)
    return x.to(DEVICE, dtype)


def apart(y: Tensor, exact: Tensor) -> float:
    return float(((y.float() - exact).norm() / exact.norm().clamp_min(1e-30)).detach())


@settings(max_examples=15, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    n=st.integers(0, 17),
    width=st.integers(1, 700),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(DTYPES),
    strided=st.booleans(),
    inverse=st.booleans(),
)
def test_rotation(
    n: int, width: int, seed: int, dtype: torch.dtype, strided: bool, inverse: bool
) -> None:
    x = random_x(n, width, dtype, strided)
    exact = (Rotated.unrotate if inverse else Rotated.rotate)(x, seed)
    y = rotate.rotate(x, seed, torch.float32, inverse=inverse)
    assert y.shape == exact.shape
    assert apart(y, exact) < PRECISION
    rounded = rotate.rotate(x, seed, inverse=inverse)
    assert rounded.dtype == dtype
    assert apart(rounded, exact) <= PRECISION + ROUNDING[dtype]


@pytest.mark.parametrize("width", [4096, 8192, 16384 + 4096 + 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_more_than_one_program(width: int, dtype: torch.dtype) -> None:
    x = random_x(2, width, dtype, False)
    assert apart(rotate.rotate(x, 5, torch.float32), Rotated.rotate(x, 5)) < PRECISION
    back = rotate.rotate(rotate.rotate(x, 5, torch.float32), 5, inverse=True)
    assert apart(back, x.float()) < 2 * PRECISION


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1, 2**31, 2**32 - 1])
def test_signs_of_every_seed(seed: int) -> None:
    x = torch.eye(1, 40, device=DEVICE)
    torch.testing.assert_close(
        rotate.rotate(x, seed), Rotated.rotate(x, seed), rtol=1e-6, atol=1e-7
    )


@settings(max_examples=20, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    n=st.sampled_from([0, 1, 3, 16, 17, 70]),
    width=st.integers(1, 150),
    size=st.integers(1, 64),
    shared=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    strided=st.booleans(),
    transposed=st.booleans(),
)
def test_stored_blocks(
    n: int, width: int, size: int, shared: bool, dtype: torch.dtype, strided: bool, transposed: bool
) -> None:
    size = min(size, width)
    count, rest = 1 if shared else width // size, width % size
    blocks = torch.randn(count, size, size, device=DEVICE).half()
    tail = torch.randn(rest, rest, device=DEVICE).half()
    if transposed:
        blocks, tail = blocks.mT, tail.t()
    x = random_x(n, width, dtype, strided)
    exact = apply_blocks(x, blocks, tail)
    assert apart(rotate.turn(x, blocks, tail, torch.float32), exact) < PRECISION
    y = rotate.turn(x, blocks, tail)
    assert y.dtype == dtype
    assert apart(y, exact) <= PRECISION + ROUNDING[dtype]


@settings(max_examples=15, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    n=st.integers(0, 17),
    width=st.sampled_from([1, 40, 300, 1025]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    strided=st.booleans(),
)
def test_order_and_factors(n: int, width: int, dtype: torch.dtype, strided: bool) -> None:
    x = random_x(n, width, dtype, strided)
    order = torch.randperm(width).to(DEVICE)
    scale = torch.rand(width, device=DEVICE).half()
    small = compact(order, width)
    assert torch.equal(rotate.arrange(x, small), x[:, order])
    scaled = (x * scale.float()).to(dtype)
    assert torch.equal(rotate.arrange(x, scale=scale), scaled)
    both = (x[:, order] * scale.float()).to(dtype)
    assert torch.equal(rotate.arrange(x, small, scale), both)


@pytest.fixture
def on_this_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """`matmul` takes what is registered for GPUs, whatever the device; nothing in C++ or CUDA."""
    monkeypatch.setenv("PLIANT_GPU_KERNELS", "1")
    monkeypatch.setattr(cpu, "library", lambda: None)
    monkeypatch.setattr(gpu, "_library", lambda *_, **__: None)
    for (form, device), kernel in list(dispatch._KERNELS.items()):
        if device == "cuda":
            monkeypatch.setitem(dispatch._KERNELS, (form, "cpu"), kernel)


@pytest.mark.usefixtures("on_this_device")
@pytest.mark.parametrize("n", [1, 66])
def test_any_code_on_a_gpu(n: int) -> None:
    @settings(max_examples=20, deadline=None, phases=[Phase.explicit, Phase.generate])
    @given(codes(), st.booleans())
    def agrees(code: Code, strided: bool) -> None:
        code = code.to(DEVICE)
        x = random_x(n, code.shape[1], torch.float32, strided)
        weight = code.decode().double()
        bound = 2e-6 * float((x.double().norm(dim=1)[:, None] * weight.norm(dim=1)).norm())
        assert float((matmul(x, code) - x.double() @ weight.t()).norm()) <= bound
        assert apart(launched(code), code.decode()) < 2e-6
        some = slice(1, 5)
        assert apart(launched(code, rows=some), code.rows(some)) < 2e-6

    agrees()


def test_otherwise_the_reference_multiplies(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("rotate", "turn", "arrange"):
        monkeypatch.setattr(rotate, name, lambda *_, **__: pytest.fail("the kernel ran"))
    inner = group_int(9, 40)
    scale = torch.rand(40).half()
    for kernel, code in (
        (gpu.rotated, Rotated(inner, 3)),
        (gpu.permuted, Permuted.by(inner, torch.randperm(40))),
        (gpu.scaled, Scaled(inner, in_scale=scale)),
    ):
        code = code.to(DEVICE)
        x = torch.randn(2, 40, device=DEVICE, requires_grad=why == "gradients")
        assert apart(kernel(x, code), x.float() @ code.decode().t()) < 1e-3
