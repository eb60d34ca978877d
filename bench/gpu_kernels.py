"""GPU kernels: agreement with decode-and-multiply, then speed beside bf16 and other projects.

    python bench/kernels.py [--out bench/results] [--seconds 170] [--only decode,batch,sum,other]

Correct first: each kernel against the float64 product with the decoded matrix, batch 1 to 70. Then
time: a CUDA graph of some hundred products that cycle through at least 200 MB of distinct weights,
so that none is found in the L2 cache; the median of repeated replays, over the number of products.
Every way to cut the work that the package may choose is tried and the fastest reported; --shapes
refreshes the data file that the package ships (bench/shapes.py). GB/s counts the code's bytes, x
and y. Peers are timed where they are installed: torch's tinygemm (int4), gemlite. A case that fails
is noted and the rest goes on; results are written after each case.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("PLIANT_GPU_KERNELS", "1")
import torch
import torch.nn.functional as F
from torch import Tensor

import shapes
from pliant import codes as forms
from pliant.codes import GroupInt, GroupLevels, GroupScales, Sparse
from pliant.codes.packing import PLANES, plane_bytes
from pliant.kernels import matmul
from pliant.kernels.cuda import build, tuning
from pliant.kernels.cuda import shapes as cuts
from pliant.kernels.cuda.decode import (
    Shape,
    Terms,
    choose_shape,
    expand,
    level_digits,
    multiply,
    multiply_each,
    project,
    sparse_terms,
    vector_bytes,
)
from pliant.kernels.decoding import launched
from pliant.methods.levels import byte_tables

SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336)]  # out, in
SPILL = 200e6  # bytes of distinct weights in a cycle: four times the L2 cache of an H100
LAUNCHES = 150  # products of a graph, at least
Code = GroupInt | GroupLevels


class Results:
    """Rows by name, written after each; a run that was cut off goes on where it was."""

    def __init__(self, folder: Path):
        self.path = folder / "kernels.json"
        folder.mkdir(parents=True, exist_ok=True)
        self.rows: dict[str, dict[str, Any]] = {}
        if "--resume" in sys.argv and self.path.exists():
            self.rows = json.loads(self.path.read_text())["rows"]

    def add(self, name: str, **row: Any) -> None:
        self.rows[name] = row
        gpu = torch.cuda.get_device_properties(0)
        about = {
            "device": gpu.name, "capability": [gpu.major, gpu.minor],
            "multiprocessors": gpu.multi_processor_count, "torch": torch.__version__,
        }  # fmt: skip
        self.path.write_text(json.dumps({**about, "rows": self.rows}, indent=1) + "\n")
        self.path.with_suffix(".md").write_text(self.table())
        print(name, " ".join(f"{k}={_brief(v)}" for k, v in row.items()), flush=True)

    def table(self) -> str:
        lines = [
            f"GPU kernels on {torch.cuda.get_device_name()}: `python bench/kernels.py`.",
            "",
            "| product | microseconds | times bf16 | GB/s | of a copy | how |",
            "|---|---|---|---|---|---|",
        ]
        for name, row in self.rows.items():
            if "us" in row:
                ratio, share = row.get("times_bf16"), row.get("of_copy")
                lines.append(
                    f"| {name} | {row['us']:.2f} | {'' if ratio is None else f'{ratio:.2f}'} "
                    f"| {row.get('gbs', 0):.0f} | {'' if share is None else f'{share:.2f}'} "
                    f"| {row.get('how', '')} |"
                )
        return "\n".join(lines) + "\n"


def _brief(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ---- making codes -------------------------------------------------------------------------------


def random_code(
    out: int, width: int, bits: int, group: int, *, digits: int = 0, packed: bool = False
) -> Code:
    """Random stored bytes; digits: of levels, 0 for integers.

    packed: scales of 6 bits, and zero points or four tables; else of fp16, symmetric, one table.
    """

    def planes(columns: int, of: int) -> tuple[Tensor, ...]:
        return tuple(
            torch.randint(0, 256, (out, plane_bytes(columns, p)), dtype=torch.uint8, device="cuda")
            for p in PLANES[of]
        )

    groups = -(-width // group)
    if packed:
        row_scale = torch.rand(out, device="cuda").mul_(0.02).add_(0.01).half()
        scales = GroupScales(planes(groups, 6), row_scale, 6, groups)
    else:
        half = torch.rand(out, groups, device="cuda").mul_(0.02).add_(0.005).half()
        scales = GroupScales((half,), None, 16, groups)
    q = planes(width, bits)
    if digits:
        tables = torch.randn(4 if packed else 1, 2**bits).sort(1).values
        tables = (byte_tables(tables) if digits == 1 else tables).half().to("cuda")
        selector = planes(groups, 2) if packed else None
        code = GroupLevels(q, scales, tables, selector, width, bits, group)
        assert level_digits(code) == digits  # seen before a graph is captured
        return code
    zeros = planes(groups, bits) if packed else None
    return GroupInt(q, scales, zeros, width, bits, group)


OTHERS: dict[str, Callable[[int, int], forms.Code]] = {
    "codebook4": lambda o, w: _codebook(o, w, 4, w),
    "codebook3 g128": lambda o, w: _codebook(o, w, 3, 128),
    "ternary g128": lambda o, w: _ternary(o, w, 128),
    "ternary": lambda o, w: _ternary(o, w, w),
    "signs of rank 16": lambda o, w: forms.Signed.of(
        torch.rand(o, w) < 0.5, forms.LowRank.from_factors(torch.rand(o, 16), torch.rand(16, w))
    ),
    "rotated int4": lambda o, w: forms.Rotated(random_code(o, w, 4, 128), 5),
    "turned int4": lambda o, w: forms.BlockRotated.by(
        random_code(o, w, 4, 128), torch.randn(w // 64, 64, 64) / 8, torch.randn(w % 64, w % 64)
    ),
    "permuted int4": lambda o, w: forms.Permuted.by(
        random_code(o, w, 4, 128), torch.randperm(w)
    ),
    "scaled int4": lambda o, w: forms.Scaled(
        random_code(o, w, 4, 128), torch.rand(o).half(), torch.rand(w).half()
    ),
}  # fmt: skip


def other_code(kind: str, out: int, width: int) -> forms.Code:
    """A random code of one of the forms that are not group codes."""
    with torch.device("cuda"):
        return OTHERS[kind](out, width)


def _codebook(out: int, width: int, bits: int, group: int) -> forms.Code:
    index = torch.randint(0, 2**bits, (out, width), dtype=torch.uint8)
    levels = torch.randn(out, -(-width // group), 2**bits)
    return forms.Codebook.pack(index, levels, bits, group)


def _ternary(out: int, width: int, group: int) -> forms.Code:
    trits = torch.randint(0, 3, (out, width), dtype=torch.uint8)
    return forms.Ternary.pack(trits, torch.rand(out, -(-width // group)), group)


def random_x(n: int, width: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(n, width, device="cuda").to(dtype)


# ---- correctness --------------------------------------------------------------------------------


def disagreement(y: Tensor, x: Tensor, weight: Tensor) -> tuple[float, float]:
    """(error of y, what rounding the exact product to y's dtype costs), relative, in float64."""
    exact = x.double() @ weight.double().t()
    norm = exact.norm()
    error = float((y.double() - exact).norm() / norm)
    return error, float((exact.to(y.dtype).double() - exact).norm() / norm)


def check(bits: int, digits: int, dtype: torch.dtype, library: Any) -> dict[str, Any]:
    """The largest error over batches and forms, in units of the rounding of the output."""
    stream = torch.cuda.current_stream().cuda_stream
    worst, cases = 0.0, 0
    per_byte = 8 // PLANES[bits][-1]
    for out, bytes_, group in ((1000, 192, 64), (77, 96, 32), (130, 1024, 128), (33, 48, 16)):
        width = bytes_ * per_byte
        for packed in (False, True):
            code = random_code(out, width, bits, group, digits=digits, packed=packed)
            weight = code.decode(torch.float64)
            if vector_bytes(code) >= 8:
                decoded = expand(code, dtype == torch.float16, library, stream)
                torch.testing.assert_close(decoded, code.decode(dtype), rtol=2.0**-7, atol=0)
            for n in (1, 2, 3, 5, 8, 9, 15, 16):
                x = random_x(n, width, dtype)
                for shape in (Shape(), Shape(4, 2), Shape(16, 4), Shape(8, 3, 2, 1, 5)):
                    y = torch.full((n, out), torch.nan, dtype=dtype, device="cuda")
                    multiply(x, code, library, stream, shape, y=y)
                    error, rounding = disagreement(y, x, weight)
                    worst = max(worst, error / rounding) if error == error else float("nan")
                    cases += 1
                    if not worst < 1.2:
                        raise AssertionError(f"{out}x{width} g{group} n{n} {shape}: {worst}")
    return {"worst_in_roundings": worst, "cases": cases}


def check_triton(bits: int, digits: int) -> dict[str, Any]:
    """Triton's kernels on ragged shapes and strided x, float32 and bf16."""
    from pliant.kernels.triton import group as triton_group

    worst = 0.0
    for out, width, group, packed in ((77, 129, 48, True), (130, 256, 64, False)):
        code = random_code(out, width, bits, group, digits=digits, packed=packed)
        weight = code.decode(torch.float64)
        for n in (1, 17):
            x = torch.randn(width, n, device="cuda").t()
            error, _ = disagreement(triton_group.multiply(x, code), x, weight)
            assert error < 1e-5, (out, width, n, error)
            half = x.to(torch.bfloat16)
            rounded = code.decode(torch.bfloat16)
            error, rounding = disagreement(triton_group.multiply(half, code), half, rounded)
            worst = max(worst, error / rounding)
            assert worst < 1.2, (out, width, n, worst)
        decoded = triton_group.decode(code, torch.float32)
        torch.testing.assert_close(decoded, code.decode(torch.float32), rtol=1e-6, atol=0)
    return {"worst_in_roundings": worst}


def check_sum(library: Any) -> dict[str, Any]:
    """Low-rank and sparse terms in one launch."""
    stream = torch.cuda.current_stream().cuda_stream
    worst = 0.0
    counters = torch.zeros(2, dtype=torch.int32, device="cuda")
    code = random_code(200, 1024, 4, 64)
    a = torch.randn(200, 24, device="cuda").half()
    b = (torch.randn(24, 1024, device="cuda") * 0.02).half()
    dense = torch.randn(200, 1024, device="cuda") * (torch.rand(200, 1024, device="cuda") < 0.02)
    sparse = Sparse.from_dense(dense)
    weight = code.decode(torch.float64) + a.double() @ b.double() + sparse.decode(torch.float64)
    for n in (1, 3, 8, 16):
        x = random_x(n, 1024)
        for overlap, fused_ in product((False, True), (False, True)):
            if fused_:
                terms = Terms(a, torch.full((n, 24), torch.nan, device="cuda"),
                              *sparse_terms(sparse), b=b, counters=counters)  # fmt: skip
            else:
                middle = project(x, b, library, stream, overlap)
                terms = Terms(a, middle, *sparse_terms(sparse), late=True)
            y = multiply(x, code, library, stream, Shape(overlap=overlap), terms)
            error, rounding = disagreement(y, x, weight)
            worst = max(worst, error / rounding)
            assert worst < 1.2, (n, overlap, fused_, worst)
            assert not counters.any()
    return {"worst_in_roundings": worst}


def check_other(kind: str) -> dict[str, Any]:
    """Products and whole matrices of codes that are not group codes, beside the reference's.

    "times": the largest error of a product in bf16 over that of the reference, which rounds in the
    same places.
    """
    worst = precise = 0.0
    for out, width in ((77, 131), (300, 1152), (64, 8192 + 4096 + 576)):
        code = other_code(kind, out, width)
        weight = code.decode(torch.float64)
        torch.testing.assert_close(launched(code), code.decode(), rtol=1e-5, atol=1e-5)
        for n in (1, 3, 16, 17, 70):
            x = torch.randn(width, n, device="cuda").t()
            precise = max(precise, disagreement(matmul(x, code), x, weight)[0])
            assert precise < 1e-5, (out, width, n, precise)
            half = x.to(torch.bfloat16)
            y = matmul(half, code)
            with reference_only():
                expected = matmul(half, code)
            error, plain = (disagreement(z, half, weight)[0] for z in (y, expected))
            worst = max(worst, error / plain)
            assert worst < 1.3, (out, width, n, worst)
    return {"times": worst, "float32": precise}


@contextmanager
def reference_only() -> Iterator[None]:
    os.environ["PLIANT_GPU_KERNELS"] = "0"
    try:
        yield
    finally:
        os.environ["PLIANT_GPU_KERNELS"] = "1"


# ---- timing -------------------------------------------------------------------------------------


def microseconds(launch: Callable[[int], Any], distinct: int, quick: bool = False) -> float:
    """Of one product: `launch(i)` uses the i-th of `distinct` weights."""
    return tuning.microseconds(launch, distinct, quick, LAUNCHES)


def distinct_of(nbytes: int) -> int:
    return max(2, -(-int(SPILL) // nbytes))


def copy_speed() -> float:
    """GB/s of a large device-to-device copy, read and written."""
    source = torch.empty(1 << 29, dtype=torch.int32, device="cuda").random_()
    target = torch.empty_like(source)
    took = microseconds(lambda i: _call(target.copy_, source), 8, quick=True)
    return 2 * source.nbytes / took / 1e3


def bf16_time(out: int, width: int, n: int) -> float:
    """cuBLAS: its matrix product or, for one row, its matrix-vector product if faster."""
    distinct = distinct_of(2 * out * width)
    weights = [torch.randn(out, width, device="cuda").bfloat16() for _ in range(distinct)]
    x, y = random_x(n, width), torch.empty(n, out, dtype=torch.bfloat16, device="cuda")
    took = microseconds(lambda i: _call(torch.mm, x, weights[i].t(), out=y), distinct)
    if n == 1:
        one = microseconds(lambda i: _call(torch.mv, weights[i], x[0], out=y[0]), distinct)
        took = min(took, one)
    return took


def time_code(
    codes: list[Code],
    n: int,
    library: Any,
    terms: Callable[[int, Tensor, int], Terms] | None = None,
) -> dict[str, Any]:
    """The fastest cut, and the same without overlap with the kernel before."""
    out, width = codes[0].shape
    x = random_x(n, width)
    y = torch.empty(n, out, dtype=x.dtype, device="cuda")

    def timed(shape: Shape, quick: bool) -> float:
        def launch(i: int) -> None:
            stream = torch.cuda.current_stream().cuda_stream
            extra = Terms() if terms is None else terms(i, x, stream)
            multiply(x, codes[i], library, stream, shape, extra, y)

        return microseconds(launch, len(codes), quick)

    example = Terms() if terms is None else terms(0, x, torch.cuda.current_stream().cuda_stream)
    case = cuts.Case.of(codes[0], n, example)
    count = torch.cuda.get_device_properties(0).multi_processor_count
    most = tuning.most_warps(library, case, x.device)
    tried = tuning.fastest(cuts.candidates(case, count, most), timed)
    shape, took = next(iter(tried.items()))
    alone = timed(replace(shape, overlap=False), False)
    moved = codes[0].nbytes + 2 * n * (out + width)
    how = f"{shape.warps} warps, {shape.row_tiles} tiles, {shape.depth} deep, {shape.loads} loads"
    return {
        "us": took, "gbs": moved / took / 1e3, "us_no_overlap": alone, "how": how,
        "case": asdict(case), "tried": {cuts.written(s): t for s, t in tried.items()},
    }  # fmt: skip


def time_other(kind: str, out: int, width: int, dense: float) -> dict[str, Any]:
    """One row of x; decoding the matrix to bf16; and what the reference takes, without a graph.

    The reference chooses by values and copies from the host, which no graph can hold.
    """
    one = other_code(kind, out, width)
    codes = [one, *(other_code(kind, out, width) for _ in range(distinct_of(one.nbytes) - 1))]
    x = random_x(1, width)
    took = microseconds(lambda i: _call(matmul, x, codes[i]), len(codes))
    whole = microseconds(lambda i: _call(launched, codes[i], torch.bfloat16), len(codes), True)
    with reference_only():
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        matmul(x, codes[0])
        begin.record()
        for code in codes[:10]:
            matmul(x, code)
        end.record()
        end.synchronize()
        plain = begin.elapsed_time(end) * 1e3 / len(codes[:10])
    moved = one.nbytes + 2 * (out + width)
    return {"us": took, "times_bf16": dense / took, "gbs": moved / took / 1e3, "bits": one.bits,
            "decode_us": whole, "reference_us": plain}  # fmt: skip


def time_prefill(codes: list[Code], n: int, library: Any) -> Iterator[tuple[str, float]]:
    """(way, microseconds): decoded whole, by the CUDA kernel or Triton's, then cuBLAS."""
    from pliant.kernels.triton import group as triton_group

    x = random_x(n, codes[0].width)

    def by_cuda(i: int) -> Tensor:
        return expand(codes[i], False, library, torch.cuda.current_stream().cuda_stream)

    def by_triton(i: int) -> Tensor:
        return triton_group.decode(codes[i], x.dtype)

    for name, decode in (("decode", by_cuda), ("Triton's decode", by_triton)):
        yield f"{name} alone", microseconds(lambda i, d=decode: _call(d, i), len(codes), True)
        yield (
            f"{name} + cuBLAS",
            microseconds(lambda i, d=decode: _call(F.linear, x, d(i)), len(codes), True),
        )


# ---- peers --------------------------------------------------------------------------------------


def tinygemm_time(out: int, width: int, n: int, group: int = 128) -> float:
    """torch's int4 kernel (torchao's tinygemm)."""
    distinct = distinct_of(out * width // 2)
    pack: Any = torch.ops.aten._convert_weight_to_int4pack
    product_: Any = torch.ops.aten._weight_int4pack_mm
    packed, scales = [], []
    for _ in range(distinct):
        q = torch.randint(0, 256, (out, width // 2), dtype=torch.uint8, device="cuda")
        packed.append(pack(q, 8))
        scales.append(torch.rand(width // group, out, 2, device="cuda").bfloat16())
    x = random_x(n, width)
    return microseconds(lambda i: _call(product_, x, packed[i], group, scales[i]), distinct)


def gemlite_time(out: int, width: int, n: int, bits: int, group: int = 128) -> float:
    from gemlite.core import DType, GemLiteLinearTriton

    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(30)  # it may tune itself for minutes
    dtype = torch.float16
    layers = []
    for _ in range(distinct_of(out * width * bits // 8)):
        layer = GemLiteLinearTriton(
            bits, group_size=group, in_features=width, out_features=out,
            input_dtype=DType.FP16, output_dtype=DType.FP16,
        )  # fmt: skip
        q = torch.randint(0, 2**bits, (out, width), dtype=torch.uint8, device="cuda")
        scales = torch.rand(out, width // group, dtype=dtype, device="cuda") * 0.01
        zeros = torch.full_like(scales, 2.0 ** (bits - 1))
        layer.pack(q, scales, zeros, None)
        layers.append(layer)
    x = random_x(n, width, dtype)
    try:
        return microseconds(lambda i: _call(layers[i], x), len(layers))
    finally:
        signal.alarm(0)


def _too_long(*_: Any) -> None:
    raise TimeoutError("a peer took more than 30 seconds to start")


def _call(function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    function(*arguments, **options)


# ---- the run ------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--seconds", type=float, default=170)
    parser.add_argument(
        "--only", default="check,decode,together,batch,sum,prefill,peers,more,other"
    )
    parser.add_argument("--resume", action="store_true", help="go on after a crash of the device")
    parser.add_argument("--began", type=float, default=time.time())
    parser.add_argument("--shapes", type=Path, help="data file to refresh with what was timed")
    options = parser.parse_args()
    results = Results(options.out)
    wanted = options.only.split(",")

    def run(name: str, work: Callable[[], dict[str, Any]]) -> None:
        """One case; after an error that the device does not survive, the process starts anew."""
        left = options.seconds - (time.time() - options.began)
        if name in results.rows or left < 0 or name.split()[0] not in wanted:
            return
        try:
            results.add(name, **work())
        except Exception as error:
            traceback.print_exc(limit=4)
            reason = f"{type(error).__name__}: {str(error)[:200]}"
            results.rows[name] = {"error": reason}
            print(name, "FAILED", reason, flush=True)
            try:
                torch.cuda.synchronize()
            except Exception:
                results.path.write_text(json.dumps({"rows": results.rows}))
                again = [sys.executable, *sys.argv, "--began", str(options.began)]
                os.execv(sys.executable, [a for a in again if a != "--resume"] + ["--resume"])
        torch.cuda.empty_cache()

    libraries = _libraries(half=any(r == "check" for r in wanted))
    copy: dict[str, float] = {}
    dense: dict[tuple[int, int, int], float] = {}

    def base(out: int, width: int, n: int) -> float:
        if (out, width, n) not in dense:
            took = dense[out, width, n] = bf16_time(out, width, n)
            torch.cuda.empty_cache()
            moved = 2 * (out * width + n * (out + width))
            print(f"bf16 {out}x{width} batch {n}: {took:.2f} us {moved / took / 1e3:.0f} GB/s")
        return dense[out, width, n]

    def timed(
        out: int, width: int, n: int, bits: int, digits: int = 0, packed: bool = False
    ) -> dict[str, Any]:
        library = libraries[bits, digits, False, False].result()
        group = 64 if packed else 128
        one = random_code(out, width, bits, group, digits=digits, packed=packed)
        more = range(distinct_of(one.nbytes) - 1)
        kinds = {"digits": digits, "packed": packed}
        codes = [one, *(random_code(out, width, bits, group, **kinds) for _ in more)]
        row = time_code(codes, n, library)
        reference = base(out, width, n)
        return row | {
            "times_bf16": reference / row["us"], "bf16_us": reference,
            "of_copy": row["gbs"] / copy["gbs"], "bits": one.bits,
        }  # fmt: skip

    def check_half(bits: int) -> dict[str, Any]:
        return check(bits, 0, torch.float16, libraries[bits, 0, True, False].result())

    copy["gbs"] = copy_speed()
    torch.cuda.empty_cache()
    results.add("copy", gbs=copy["gbs"])
    for n, (out, width) in product((1, 8, 512), SHAPES):  # while nvcc works
        base(out, width, n)

    for bits, digits in _KERNELS:
        kind = _kind(digits)
        run(
            f"check {kind}{bits} bf16",
            lambda b=bits, d=digits: check(
                b, d, torch.bfloat16, libraries[b, d, False, False].result()
            ),
        )
    run("check sum", lambda: check_sum(libraries[4, 0, False, True].result()))
    for bits, (out, width) in product((4, 2, 3, 8), SHAPES):
        run(f"decode int{bits} {out}x{width}", lambda b=bits, o=out, w=width: timed(o, w, 1, b))
    for out, width in SHAPES:
        run(f"peers tinygemm int4 {out}x{width} batch 1",
            lambda o=out, w=width: {"us": tinygemm_time(o, w, 1)})  # fmt: skip
    for bits, (out, width) in product((4, 2), SHAPES):
        run(f"batch 8 int{bits} {out}x{width}", lambda b=bits, o=out, w=width: timed(o, w, 8, b))
    for out, width in SHAPES:
        run(f"sum int4 + rank 32 {out}x{width}",
            lambda o=out, w=width: _time_sum(o, w, libraries, results))  # fmt: skip
    for out, width in SHAPES:
        run(f"prefill 512 int4 {out}x{width}",
            lambda o=out, w=width: _prefill(
                o, w, base(o, w, 512), libraries[4, 0, False, False].result()))  # fmt: skip
    for bits, (out, width) in product((4, 2, 8), SHAPES):
        run(f"peers gemlite int{bits} {out}x{width} batch 1",
            lambda b=bits, o=out, w=width: {"us": gemlite_time(o, w, 1, b)})  # fmt: skip
    for bits, (out, width), digits in product((4, 3, 2), SHAPES, (1, 2)):
        run(f"decode {_kind(digits)}{bits} {out}x{width}",
            lambda b=bits, o=out, w=width, d=digits: timed(o, w, 1, b, d))  # fmt: skip
    for bits, (out, width), digits in product((4, 3, 2), SHAPES, (1, 2)):
        run(f"decode {_kind(digits)}{bits} {out}x{width} g64, 6-bit scales, 4 tables",
            lambda b=bits, o=out, w=width, d=digits: timed(o, w, 1, b, d, True))  # fmt: skip
    for (bits, digits, packed), outs in product(_TOGETHER, ((4096, 1024, 1024), (14336, 14336))):
        wide = (
            "+".join(map(str, outs)) + "x4096" + (" g64, 6-bit scales, 4 tables" if packed else "")
        )
        run(f"together {_kind(digits)}{bits} {wide}",
            lambda b=bits, d=digits, p=packed, o=outs: _time_together(
                o, 4096, b, d, p, libraries[b, d, False, False].result()))  # fmt: skip
    for bits in (4, 2, 3):
        run(f"decode int{bits} 4096x4096 g64, 6-bit scales, zeros",
            lambda b=bits: timed(4096, 4096, 1, b, packed=True))  # fmt: skip
    for bits, digits in ((4, 0), (2, 0), (3, 2), (8, 0)):
        run(f"check {_kind(digits)}{bits} triton", lambda b=bits, d=digits: check_triton(b, d))
    for kind in OTHERS:
        run(f"check {kind}", lambda k=kind: check_other(k))
    for kind, (out, width) in product(OTHERS, SHAPES[:2]):
        run(f"other {kind} {out}x{width}",
            lambda k=kind, o=out, w=width: time_other(k, o, w, base(o, w, 1)))  # fmt: skip
    for bits in (4, 8, 2):
        run(f"check int{bits} fp16",
            lambda b=bits: check_half(b))  # fmt: skip
    for bits, (out, width) in product((4, 2), SHAPES):
        run(f"batch 16 int{bits} {out}x{width}", lambda b=bits, o=out, w=width: timed(o, w, 16, b))
    for out, width in SHAPES:
        run(f"peers tinygemm int4 {out}x{width} batch 8",
            lambda o=out, w=width: {"us": tinygemm_time(o, w, 8)})  # fmt: skip
        run(f"peers gemlite int4 {out}x{width} batch 8",
            lambda o=out, w=width: {"us": gemlite_time(o, w, 8, 4)})  # fmt: skip
    for bits, (out, width) in product((1, 5, 6), SHAPES[:1]):
        run(f"more int{bits} {out}x{width}", lambda b=bits, o=out, w=width: timed(o, w, 1, b))
    print(results.table())
    if options.shapes:
        shapes.refresh([results.path], options.shapes)


_TOGETHER = ((4, 0, False), (2, 0, False), (3, 1, True))  # bits, digits, packed
_KERNELS = [(b, 0) for b in (4, 2, 3, 8, 1, 5, 6)] + [(b, d) for b in (4, 3, 2) for d in (1, 2)]


def _kind(digits: int) -> str:
    """In the names of rows; levels of any fp16 take two digits."""
    return ("int", "levels", "fp16 levels")[digits]


def _libraries(half: bool) -> dict[tuple[int, int, bool, bool], Any]:
    """Futures of the compiled kernels, built side by side."""
    wanted = [(4, 0, False, True), *((b, d, False, False) for b, d in _KERNELS)]
    wanted += [(b, 0, True, False) for b in (4, 8, 2)] if half else []
    pool = ThreadPoolExecutor(os.cpu_count())
    build.compiler(), torch.cuda.get_device_capability()
    return {key: pool.submit(_library, *key) for key in wanted}


def _library(bits: int, digits: int, half: bool, terms: bool) -> Any:
    library = build.library(bits, digits, half, terms)
    if library is None:
        raise RuntimeError(f"no kernel for {bits} bits")
    return library


def _time_sum(out: int, width: int, libraries: Any, results: Results) -> dict[str, Any]:
    library = libraries[4, 0, False, True].result()
    one = random_code(out, width, 4, 128)
    count = distinct_of(one.nbytes)
    codes = [one, *(random_code(out, width, 4, 128) for _ in range(count - 1))]
    factors = [
        (torch.randn(out, 32, device="cuda").half(), torch.randn(32, width, device="cuda").half())
        for _ in codes
    ]

    counters = torch.zeros(2, dtype=torch.int32, device="cuda")
    middle = torch.empty(1, 32, device="cuda")

    def together(i: int, x: Tensor, stream: int) -> Terms:
        a, b = factors[i]
        return Terms(a, middle, b=b, counters=counters)

    def before(i: int, x: Tensor, stream: int) -> Terms:
        a, b = factors[i]
        return Terms(a, project(x, b, library, stream), late=True)

    row = time_code(codes, 1, library, together)
    row["us_two_launches"] = time_code(codes, 1, library, before)["us"]
    alone = results.rows.get(f"decode int4 {out}x{width}", {}).get("us")
    return row | ({"slower": row["us"] / alone - 1} if alone else {})


def _time_together(
    outs: tuple[int, ...], width: int, bits: int, digits: int, packed: bool, library: Any
) -> dict[str, Any]:
    """Products that share x in one launch, and in one each (`us_apart`), each cut at its best."""
    x, group = random_x(1, width), 64 if packed else 128

    def made() -> list[Any]:
        return [random_code(o, width, bits, group, digits=digits, packed=packed) for o in outs]

    sets = [made()]
    nbytes = sum(code.nbytes for code in sets[0])
    sets += [made() for _ in range(distinct_of(nbytes) - 1)]
    alone = [choose_shape(code, 1, library) for code in sets[0]]

    def together(i: int, shape: Shape) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        multiply_each(x, sets[i], library, stream, shape)

    def apart(i: int) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        for code, own in zip(sets[i], alone, strict=True):
            multiply(x, code, library, stream, own)

    count = torch.cuda.get_device_properties(0).multi_processor_count
    case = replace(cuts.Case.of(sets[0][0], 1), out=sum(outs))
    took = {}
    for shape in cuts.candidates(case, count, tuning.most_warps(library, case, x.device)):
        took[cuts.written(shape)] = microseconds(partial(together, shape=shape), len(sets), True)
    chosen = cuts.written(choose_shape(sets[0][0], 1, library, rows=sum(outs)))
    return {
        "us": min(took.values()), "us_apart": microseconds(apart, len(sets)), "tried": took,
        "us_as_chosen": took.get(chosen), "gbs": nbytes / min(took.values()) / 1e3,
        "how": min(took, key=took.__getitem__),
    }  # fmt: skip


def _prefill(out: int, width: int, dense: float, library: Any) -> dict[str, Any]:
    one = random_code(out, width, 4, 128)
    codes = [one, *(random_code(out, width, 4, 128) for _ in range(distinct_of(one.nbytes) - 1))]
    ways = dict(time_prefill(codes, 512, library))
    best = min((w for w in ways if not w.endswith("alone")), key=ways.__getitem__)
    times = {way: round(took, 1) for way, took in ways.items()}
    return {"us": ways[best], "times_bf16": dense / ways[best], "how": best, "ways": times,
            "bf16_us": dense}  # fmt: skip


if __name__ == "__main__":
    main()
