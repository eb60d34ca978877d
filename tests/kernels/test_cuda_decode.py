"""The CUDA decode kernel gives the product with the decoded matrix.

On a GPU it runs there. Without one its source is compiled for the CPU, its threads as fibers and
the tensor core's instruction in plain C++ (cuda_emulation/), which checks indices and arithmetic.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pliant.codes import Dense, GroupInt, GroupLevels, LowRank, Sparse, Sum, power_scales
from pliant.kernels import gpu
from pliant.kernels.cuda import build, decode, tuning
from pliant.kernels.cuda.decode import Shape, Terms
from pliant.kernels.cuda.shapes import Case, Gpu, Table, candidates
from pliant.methods.levels import byte_tables
from tests.kernels.group_codes import Form, group_code

GPU = torch.cuda.is_available() and build.compiler() is not None
DEVICE = "cuda" if GPU else "cpu"
HERE = Path(__file__).parent / "cuda_emulation"
# What is compiled: (bits, digits of a level, half): all widths, some in bf16 and some in fp16.
BUILDS = [(b, 0, b % 3 == 2) for b in range(1, 9)]
BUILDS += [(b, 2, b == 3) for b in range(1, 5)] + [(b, 1, b == 2) for b in range(1, 5)]
pytestmark = pytest.mark.skipif(not (GPU or shutil.which("g++")), reason="no nvcc and no g++")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulated")


@cache
def library(bits: int, digits: int, half: bool, folder: Path, terms: bool = False) -> Any:
    if GPU:
        return build.library(bits, digits, half, terms)
    target = folder / f"{bits}{digits}{half:d}{terms:d}.so"
    macros = [f"-DBITS={bits}", f"-DLEVELS={digits}", f"-DHALF={half:d}", f"-DTERMS={terms:d}"]
    includes = [f"-I{HERE}", f"-I{Path(decode.__file__).parent}"]
    flags = ["-std=c++20", "-O0", "-w", "-shared", "-fPIC", *macros, *includes]
    command = ["g++", *flags, str(HERE / "host.cpp"), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"g++ could not build the emulation: {done.stderr[:200]}")
    return ctypes.CDLL(str(target))


def coded(form: Form, digits: int, out: int, width: int, seed: int = 0) -> GroupInt | GroupLevels:
    """A random code whose levels take so many digits, lopsided tables among them."""
    code = group_code(form, out, width, seed)
    assert isinstance(code, GroupInt | GroupLevels)
    if isinstance(code, GroupLevels) and digits == 1:
        lean = torch.tensor([0.0, 0.8, -0.8])[: len(code.tables), None]
        tables = byte_tables((code.tables.float() + lean).sort(1).values)
        code = replace(code, tables=tables.half())
    assert decode.level_digits(code) == digits
    moved = code.to(DEVICE)
    assert isinstance(moved, GroupInt | GroupLevels)
    return moved


def stream() -> int:
    return torch.cuda.current_stream().cuda_stream if GPU else 0


def error_in_roundings(y: Tensor, exact: Tensor, usual: float = 0.0) -> float:
    """Error over what rounding the exact product costs and four times what 16-bit inputs do.

    usual: the norm of a product of vectors as long as those but at random to each other. Few
    outputs may by luck be near a rounded value; float32 sums add little.
    """
    rounding = (exact.to(y.dtype).double() - exact).norm() + 1e-6 * exact.norm()
    return float((y.double() - exact).norm() / (rounding + 2.0**-13 * usual))


def usual(x: Tensor, weight: Tensor) -> float:
    lengths = x.double().norm(dim=1)[:, None] * weight.norm(dim=1)
    return float(lengths.norm()) / x.shape[1] ** 0.5


@pytest.mark.parametrize("built", BUILDS, ids=str)
@settings(max_examples=20 if GPU else 10, deadline=None)
@given(
    out=st.integers(1, 70),
    row=st.integers(1, 9),
    unit=st.sampled_from([16, 32, 64, 128]),
    groups_of=st.sampled_from([0, 1, 2]),
    n=st.one_of(st.just(1), st.integers(1, 16)),
    scales=st.sampled_from([16, 6, 5, "powers"]),
    zeros=st.booleans(),
    shape=st.builds(
        Shape,
        warps=st.sampled_from([1, 2, 4]),
        row_tiles=st.integers(1, 4),
        depth=st.sampled_from([0, 2, 4]),
        loads=st.sampled_from([0, 1, 2]),
        slab=st.sampled_from([0, 0, 1, 3]),
    ),
    scale=st.sampled_from([1.0, 1e-6, 1e4]),
)
def test_product_is_that_of_the_decoded_matrix(
    folder: Path, built: tuple[int, int, bool], out: int, row: int, unit: int, groups_of: int,
    n: int, scales: int | str, zeros: bool, shape: Shape, scale: float,
) -> None:  # fmt: skip
    """slab: x passes through shared memory in pieces."""
    bits, digits, half = built
    if half:
        scale = 1.0
    low = decode.PLANES[bits][-1]
    form = Form(
        bits, digits > 0, unit * groups_of, 16 if scales == "powers" else int(scales), zeros
    )
    code = coded(form, digits, out, row * unit * 8 // low)
    if scales == "powers":
        exponents = torch.randint(-9, 0, (out, code.groups))
        powers = power_scales(exponents, 3, torch.rand(out) + 0.1)
        moved = replace(code.to("cpu"), stored_scales=powers).to(DEVICE)
        assert isinstance(moved, GroupInt | GroupLevels)
        code = moved
    assert decode.vector_bytes(code)
    x = (torch.randn(n, code.width) * scale).to(DEVICE, torch.float16 if half else torch.bfloat16)
    y = torch.full((n, out), torch.nan, dtype=x.dtype, device=DEVICE)
    decode.multiply(x, code, library(*built, folder), stream(), shape, y=y)
    weight = code.decode(torch.float64)
    assert error_in_roundings(y, x.double() @ weight.t(), usual(x, weight)) < 1.2
    with pytest.MonkeyPatch.context() as patch:  # digits of x made once, in a launch before
        patch.setattr(decode, "_STAGED", 0)
        same = torch.full_like(y, torch.nan)
        decode.multiply(x, code, library(*built, folder), stream(), shape, y=same)
    torch.testing.assert_close(same, y, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "built", [(2, 0, False), (3, 0, False), (4, 2, False), (4, 1, False), (2, 1, True)], ids=str
)
@pytest.mark.parametrize("scale_bits", [8, 6, 5])
@pytest.mark.parametrize("group_size", [64, 128])
def test_scales_that_are_read_four_at_once(
    folder: Path, built: tuple[int, int, bool], scale_bits: int, group_size: int
) -> None:
    """Rows long enough for it: each group's scale must be its own."""
    bits, digits, half = built
    width = 32 * group_size
    code = coded(Form(bits, digits > 0, group_size, scale_bits, True), digits, 21, width)
    x = torch.randn(2, width, device=DEVICE).to(torch.float16 if half else torch.bfloat16)
    weight = code.decode(torch.float64)
    for n in (1, 2):
        y = decode.multiply(x[:n], code, library(*built, folder), stream(), Shape(4, 2))
        exact = x[:n].double() @ weight.t()
        assert error_in_roundings(y, exact, usual(x[:n], weight)) < 1.2


@pytest.mark.parametrize("built", [(4, 0, False), (3, 2, True), (4, 1, False)], ids=str)
def test_an_input_far_larger_than_its_neighbours_costs_them_little(
    folder: Path, built: tuple[int, int, bool]
) -> None:
    """Inputs keep 16 bits of the largest of their unit, whatever it is; infinity and NaN stay."""
    bits, digits, half = built
    code = coded(Form(bits, digits > 0, 128, 16, True), digits, 48, 1024)
    kernel = library(*built, folder)
    x = torch.randn(3, 1024)
    x[:, ::128] = 60.0
    x[1] = 0.0
    x = x.to(DEVICE, torch.float16 if half else torch.bfloat16)
    y = decode.multiply(x, code, kernel, stream(), Shape(4, 2))
    weight = code.decode(torch.float64)
    most = x.double().abs().amax(1, keepdim=True)
    error = (y.double() - x.double() @ weight.t()).abs()
    rounding = torch.finfo(x.dtype).eps * (x.double() @ weight.t()).abs()
    assert (error <= rounding + 2.0**-15 * most * weight.abs().sum(1)).all()
    assert not y[1].any()
    for value in (torch.inf, torch.nan):
        x[2, 7] = value
        y = decode.multiply(x, code, kernel, stream(), Shape(4, 2))
        assert y[0].isfinite().all()
        assert not y[2].isfinite().any()


@pytest.mark.parametrize("built", BUILDS, ids=str)
@pytest.mark.parametrize("outs", [(40, 9), (17, 64, 5), (1, 1, 33)])
@pytest.mark.parametrize(("scale_bits", "zeros"), [(16, False), (6, True)])
def test_codes_of_one_form_share_a_launch(
    folder: Path, built: tuple[int, int, bool], outs: tuple[int, ...], scale_bits: int, zeros: bool
) -> None:
    """Each has its own planes, scales, zero points or tables, and steps of these."""
    bits, digits, half = built
    base = Form(bits, digits > 0, 64, scale_bits, zeros)
    codes = [coded(base, digits, out, 1024, seed=out + i) for i, out in enumerate(outs)]
    assert len({decode.form(code) for code in codes}) == 1
    x = torch.randn(1, 1024, device=DEVICE).to(torch.float16 if half else torch.bfloat16)
    kernel = library(*built, folder)
    for shape in (Shape(4, 1), Shape(2, 2, slab=3)):
        found = decode.multiply_each(x, codes, kernel, stream(), shape)
        for y, code in zip(found, codes, strict=True):
            weight = code.decode(torch.float64)
            exact = x.double() @ weight.t()
            assert error_in_roundings(y, exact, usual(x, weight)) < 1.2
            alone = decode.multiply(x, code, kernel, stream(), shape)
            torch.testing.assert_close(y, alone, rtol=0, atol=0)


def test_products_that_share_x_share_launches_where_their_form_is_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu(monkeypatch, lambda bits, digits, half, terms=False: library(bits, digits, half, folder))
    launches: list[int] = []

    def counting(x: Tensor, codes: list[Any], *given: Any) -> list[Tensor]:
        launches.append(len(codes))
        return decode.multiply_each(x, codes, *given)

    monkeypatch.setattr(gpu, "multiply_each", counting)
    four, three = Form(4, False, 64, 16, True), Form(3, False, 64, 16, True)
    codes = [
        group_code(form, out, 512, seed=out).to(DEVICE)
        for form, out in ((four, 40), (three, 9), (four, 33), (three, 5), (four, 2), (four, 7))
    ]
    codes.append(Dense(torch.randn(4, 512, device=DEVICE).bfloat16()))
    x = torch.randn(1, 512, device=DEVICE).bfloat16()
    found = gpu.together(x, codes)
    assert launches == [3, 2]  # three of the four of 4 bits, and those of 3 bits
    assert [y is not None for y in found] == [True, True, True, True, True, False, False]
    for y, code in zip(found[:5], codes[:5], strict=True):
        assert y is not None
        weight = code.decode(torch.float64)
        assert error_in_roundings(y, x.double() @ weight.t(), usual(x, weight)) < 1.2
    assert gpu.together(x.repeat(2, 1), codes) == [None] * 7


def on_gpu(monkeypatch: pytest.MonkeyPatch, made: Any) -> None:
    """The functions that are registered for GPUs, with libraries of `made` where there is none."""
    monkeypatch.setenv("PLIANT_GPU_KERNELS", "1")
    monkeypatch.setattr(gpu, "has_triton", lambda: True)  # of which these products need nothing
    if not GPU:
        monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
        monkeypatch.setattr(build, "library", made)
        monkeypatch.setattr(gpu, "choose_shape", lambda *_: Shape(4, 2))


@pytest.mark.parametrize("limit", [36 << 10, 60 << 10])
def test_little_shared_memory_is_enough(
    folder: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(decode, "_shared", lambda _: limit)
    code = group_code(Form(4, False, 32, 6, True), 90, 8192).to(DEVICE)
    assert isinstance(code, GroupInt)
    kernel = library(4, 0, False, folder)
    used: list[int] = []
    shared = kernel.pliant_shared
    counting = SimpleNamespace(
        pliant_shared=lambda *given: used.append(shared(*given)) or used[-1],
        pliant_warps=kernel.pliant_warps,
        pliant_staged=kernel.pliant_staged,
        pliant_digits=kernel.pliant_digits,
        pliant_decode=kernel.pliant_decode,
    )
    x = torch.randn(3, 8192, device=DEVICE).bfloat16()
    y = decode.multiply(x, code, counting, stream(), Shape(4, 6))
    assert used[0] > limit >= used[-1]
    weight = code.decode(torch.float64)
    assert error_in_roundings(y, x.double() @ weight.t(), usual(x, weight)) < 1.2


@pytest.mark.parametrize("built", BUILDS, ids=str)
def test_each_shape_that_may_be_chosen_gives_the_product(
    folder: Path, built: tuple[int, int, bool]
) -> None:
    bits, digits, half = built
    kernel = library(*built, folder)
    code = coded(Form(bits, digits > 0, 128, 16, True), digits, 40, 1024)
    weight = code.decode(torch.float64)
    for n in (1, 7):
        x = torch.randn(n, 1024, device=DEVICE).to(torch.float16 if half else torch.bfloat16)
        case = Case.of(code, n)
        for shape in candidates(case, 1, tuning.most_warps(kernel, case, code.device)):
            y = torch.full((n, 40), torch.nan, dtype=x.dtype, device=DEVICE)
            decode.multiply(x, code, kernel, stream(), shape, y=y)
            exact = x.double() @ weight.t()
            assert error_in_roundings(y, exact, usual(x, weight)) < 1.2, shape


@pytest.mark.parametrize("built", BUILDS, ids=str)
@pytest.mark.parametrize(("out", "width"), [(4096, 14336), (151936, 896), (28672, 8192)])
def test_each_shape_that_may_be_chosen_fits_in_shared_memory(
    folder: Path, built: tuple[int, int, bool], out: int, width: int
) -> None:
    """Codes of large layers, without their bytes, on an H100 and on a GPU with 99 KiB a block."""
    bits, digits, _ = built
    kernel = library(*built, folder)
    small = coded(Form(bits, digits > 0, 128, 16, True), digits, 1, width)
    code = _taller(small, out)
    vec = decode.vector_bytes(small)
    assert vec
    for limit, count in ((decode._SHARED, 132), (99 << 10, 28)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decode, "_shared", lambda _, limit=limit: limit)
            for n in (1, 4, 8, 16):
                case = Case.of(code, n)
                for shape in candidates(case, count, tuning.most_warps(kernel, case, code.device)):
                    args = decode._Args.from_buffer_copy(decode._stored(code))
                    args.n = n
                    loads = decode._loads(code, vec, n, shape)
                    depth = decode._fit(args, code, vec, loads, shape, kernel)
                    where = (ctypes.byref(args), vec, loads, depth, shape.warps)
                    assert kernel.pliant_shared(*where) <= limit, (n, shape)
                    assert 1 <= args.row_tiles <= shape.row_tiles


def _taller(code: GroupInt | GroupLevels, out: int) -> GroupInt | GroupLevels:
    """`out` rows that are all the same bytes."""

    def tall(planes: tuple[Tensor, ...] | None) -> Any:
        return planes and tuple(p.expand(out, -1) for p in planes)

    rows = {"zeros": tall(code.zeros)} if isinstance(code, GroupInt) else {}
    scales = replace(code.stored_scales, planes=tall(code.stored_scales.planes))
    return replace(code, planes=tall(code.planes), stored_scales=scales, **rows)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_a_product_is_tuned_on_the_gpu_that_is_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also one with a low-rank term, whose scratch memory is the tuning's own."""
    monkeypatch.setenv("PLIANT_KERNEL_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "_CHOSEN", {})
    monkeypatch.setattr(tuning, "shipped", lambda: Table(()))
    code = group_code(Form(4, False, 128, 16, False), 2048, 2048).to(DEVICE)
    assert isinstance(code, GroupInt)
    x = torch.randn(1, 2048, device=DEVICE).bfloat16()
    kernel = build.library(4, 0, False, True)
    a, middle = torch.randn(2048, 11, device=DEVICE).half(), torch.randn(1, 11, device=DEVICE)
    for terms in (Terms(), Terms(a, middle)):
        shape = decode.choose_shape(code, 1, kernel, terms, x.dtype)
        here = Gpu.of(x.device)
        assert here is not None
        kept = tuning.Cached.of(here)
        assert kept.get(Case.of(code, 1, terms)) == shape
        y = decode.multiply(x, code, kernel, stream(), shape, terms)
        exact = x.double() @ code.decode(torch.float64).t()
        if terms.factor is not None:
            exact += middle.double() @ a.double().t()
        assert error_in_roundings(y, exact) < 1.2


@pytest.mark.parametrize("built", BUILDS, ids=str)
@pytest.mark.parametrize(("scale_bits", "zeros"), [(16, False), (6, True)])
def test_the_matrix_itself(
    folder: Path, built: tuple[int, int, bool], scale_bits: int, zeros: bool
) -> None:
    bits, digits, half = built
    code = coded(Form(bits, digits > 0, 32, scale_bits, zeros), digits, 37, 768)
    kernel = library(*built, folder)
    exact = code.decode(torch.float16 if half else torch.bfloat16)
    for rows in (slice(None), slice(5, 20), slice(7, 7)):
        matrix = decode.expand(code, half, kernel, stream(), rows)
        torch.testing.assert_close(matrix, exact[rows], rtol=2.0**-7, atol=0)
        assert (matrix != exact[rows]).double().mean() < 0.01 if len(matrix) else True


@pytest.mark.parametrize("n", [1, 3, 16])
def test_other_terms_of_a_sum_are_added(folder: Path, n: int) -> None:
    torch.manual_seed(n)
    code = group_code(Form(3, False, 64, 16, False), 37, 1024).to(DEVICE)
    assert isinstance(code, GroupInt)
    kernel = library(3, 0, False, folder, True)
    a, middle = torch.randn(37, 11, device=DEVICE).half(), torch.randn(n, 11, device=DEVICE)
    dense = torch.randn(37, 1024) * (torch.rand(37, 1024) < 0.03)
    sparse = Sparse.from_dense(dense.to(DEVICE))
    x = torch.randn(n, 1024, device=DEVICE).bfloat16()
    terms = Terms(a, middle, *decode.sparse_terms(sparse))
    y = decode.multiply(x, code, kernel, stream(), Shape(4, 2), terms)
    weight = code.decode(torch.float64) + sparse.decode(torch.float64)
    exact = x.double() @ weight.t() + middle.double() @ a.double().t()
    assert error_in_roundings(y, exact) < 1.2


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("width", [1024, 8 * 1024 + 256])
def test_a_sum_is_one_product(
    folder: Path, monkeypatch: pytest.MonkeyPatch, n: int, width: int
) -> None:
    """Through the function that is registered for GPUs: the projection, then all in one launch."""
    torch.manual_seed(n)
    on_gpu(monkeypatch, lambda *_: library(3, 0, False, folder, True))
    low = LowRank(
        Dense(torch.randn(21, 5).half()), Dense((torch.randn(5, width) * 0.03).bfloat16())
    )
    sparse = Sparse.from_dense(torch.randn(21, width) * (torch.rand(21, width) < 0.03))
    extra = Dense(torch.randn(21, width) * 0.01)
    code = Sum((group_code(Form(3, False, 64, 16, True), 21, width), low, sparse, extra)).to(DEVICE)
    x = torch.randn(n, width + 8, device=DEVICE).bfloat16()[:, 8:]
    y = gpu.total(x, code)
    exact = x.double() @ code.decode(torch.float32).double().t()
    assert error_in_roundings(y, exact) < 1.7  # the last part is added in x's dtype


@pytest.mark.parametrize(
    ("tables", "step"),
    [
        ([[-127, -3, 5, 127]], 1.0),
        ([[-0.25, 0.0, 0.75, 31.75]], 0.25),
        ([[-2.0, -1.0, 0.0, 8.0], [0.5, 0.5, 0.5, 0.5]], 0.5),
        ([[0.0, 0.0, 0.0, 0.0]], 2.0**-24),
        ([[-128, -3, 5, 127]], None),
        ([[-1.0, -0.1, 0.1, 1.0]], None),
        ([[-1.0, 0.0, 1.0, 100.0], [-1.0, 0.0, 0.25, 1.0]], None),
        ([[-1.0, 0.0, 1.0, torch.inf]], None),
        ([[*range(-100, -92), *range(8)]], 1.0),
        ([[*range(8), *range(-100, -92)]], None),  # the lower half is above the upper one
        ([[-127, *range(7), *range(7, 15)]], None),  # 133 steps within a half
    ],
)
def test_which_tables_are_integers_of_a_digit(
    tables: list[list[float]], step: float | None
) -> None:
    found = decode.integer_step(torch.tensor(tables).half())
    assert found == step if step else found != found


def test_a_stream_that_is_captured_takes_two_digits_unless_one_is_known_to_do(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = group_code(Form(2, True, 64, 16, False), 3, 128)
    assert isinstance(code, GroupLevels)
    code = replace(code, tables=byte_tables(code.tables.float().sort(1).values).half())
    code = code.to(DEVICE)
    assert isinstance(code, GroupLevels)
    x = torch.randn(1, 128, device=DEVICE).bfloat16()
    capturing = [True]
    with monkeypatch.context() as faked:
        faked.setattr(torch.Tensor, "is_cuda", True)
        faked.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
        for capturing[0], digits in ((True, 2), (False, 1), (True, 1)):
            assert decode.level_digits(code) == digits
            y = decode.multiply(x, code, library(2, digits, False, folder), stream())
            weight = code.decode(torch.float64)
            assert error_in_roundings(y, x.double() @ weight.t(), usual(x, weight)) < 1.2


@pytest.mark.parametrize(
    ("width", "group_size", "takes"),
    [
        (512, 64, 16),
        (512, 32, 8),
        (512, 16, 4),
        (512, 48, 4),
        (512, 8, 0),
        (512, 0, 16),
        (500, 0, 0),
    ],
)
def test_which_codes_the_kernel_takes(width: int, group_size: int, takes: int) -> None:
    code = group_code(Form(4, False, group_size, 16, False), 3, width)
    assert decode.vector_bytes(code) == takes
