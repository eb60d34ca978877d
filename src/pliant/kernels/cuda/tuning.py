"""Which way to cut a product the decode kernel takes on the GPU that is there.

As measured on such a GPU (shapes.py). On others, and far from all that was measured, the first
product times each candidate on its own stored bytes, once; the answer is kept on disk beside the
compiled kernels. Never while a CUDA graph is captured on the stream, which takes the formula's, and
never with PLIANT_TUNE=0 in the environment.

Whatever is chosen gives the right product: `decode.multiply` makes any shape fit. Tuning takes
memory for copies of the weights, three times the L2 cache; where that is more than a quarter of
what is free, nothing is tuned.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pliant.codes import GroupInt, GroupLevels
from pliant.errors import PliantError
from pliant.kernels.cuda import build, decode
from pliant.kernels.cuda.decode import Shape, Terms, level_digits, multiply
from pliant.kernels.cuda.shapes import (
    CUTS,
    Case,
    Gpu,
    candidates,
    fitting_warps,
    formula,
    parse,
    shipped,
    written,
)

_LOG = logging.getLogger(__name__)
_LEAST = 1 << 20  # bytes of weights below which any cut is about as good
_LAUNCHES = 120  # of a graph that is timed, at least
_GAIN = 0.98  # of the formula's time, below which another cut is taken

_CHOSEN: dict[tuple[Case, Gpu], Shape] = {}


def choose(
    code: GroupInt | GroupLevels, n: int, library: Any = None, terms: Terms = Terms(),
    dtype: torch.dtype = torch.bfloat16, rows: int = 0,
) -> Shape:  # fmt: skip
    """The shape of x [n, in] in dtype times the code and the terms.

    library: of `build.library`, with which it may be tuned; None: it is not. rows: of a launch of
    several codes like this one, which is cut as one tall code would be and never tuned.
    """
    case, gpu = Case.of(code, n, terms), Gpu.of(code.device)
    case = replace(case, out=rows or case.out)
    if gpu is None:
        return formula(case, 132, most_warps(library, case, code.device))
    known = _CHOSEN.get((case, gpu))
    if known is not None:
        return known
    shape = shipped().shape(case, gpu)
    tunable = library is not None and wanted() and code.planes[0].numel() >= _LEAST and not rows
    later = False
    if shape is None and tunable:
        cached = Cached.of(gpu)
        shape = cached.get(case)
        later = shape is None and torch.cuda.is_current_stream_capturing()
        if shape is None and not later:
            shape = _tuned(code, case, gpu, library, terms, dtype)
            if shape is not None:
                cached.put(case, shape)
    if shape is None:
        most = most_warps(library, case, code.device)
        shape = formula(case, gpu.multiprocessors, most)
    if library is not None and not later:
        _CHOSEN[case, gpu] = shape
    return shape


def wanted() -> bool:
    return os.environ.get("PLIANT_TUNE") != "0"


def most_warps(library: Any, case: Case, device: torch.device) -> int:
    """Of a block, that the compiled kernel runs with and whose weights fit."""
    tiles = {1: 0, 4: 1, 8: 2, 16: 4}[case.rows]
    registers = 16 if library is None else int(library.pliant_warps(1, tiles))
    return min(registers, fitting_warps(case.bits, decode._shared(device)))


class Cached:
    """Shapes that were tuned on one kind of GPU with one source of the kernel, on disk.

    What cannot be read or written costs a line in the log, and tuning anew.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @staticmethod
    def of(gpu: Gpu) -> Cached:
        return Cached(build.folder() / f"shapes-{_digest(gpu, source())}.json")

    def get(self, case: Case) -> Shape | None:
        text = self._read().get(case.key)
        try:
            return None if text is None else parse(text)
        except (ValueError, AttributeError) as error:
            _LOG.warning("a tuned shape in %s is ignored: %s", self.path, error)
            return None

    def put(self, case: Case, shape: Shape) -> None:
        """Beside what other processes have put there; renamed, so that it is never half there."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            content = json.dumps(self._read() | {case.key: written(shape)}, indent=1)
            with tempfile.TemporaryDirectory(dir=self.path.parent) as scratch:
                fresh = Path(scratch, self.path.name)
                fresh.write_text(content + "\n")
                fresh.rename(self.path)
        except OSError as error:
            _LOG.warning("tuned shapes are not kept: %s", error)

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self.path.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            _LOG.warning("tuned shapes are ignored: %s", error)
            return {}
        if not isinstance(content, dict):
            _LOG.warning("tuned shapes are ignored: %s holds none", self.path)
            return {}
        return content


def source() -> bytes:
    """Of the kernel and of what calls it."""
    folder = Path(__file__).parent
    return b"".join(path.read_bytes() for path in sorted(folder.glob("*.cu*")))


def _digest(gpu: Gpu, kernel: bytes) -> str:
    about = f"{gpu.name} {gpu.capability} {gpu.multiprocessors} {CUTS}"
    return hashlib.sha256(about.encode() + kernel).hexdigest()[:16]


def fastest(shapes: Iterable[Shape], timed: Callable[[Shape, bool], float]) -> dict[Shape, float]:
    """Microseconds of each, the fastest first: all timed in short, then the three best at length.

    timed(shape, short). One that fails is left out.
    """
    took: dict[Shape, float] = {}
    for shape in shapes:
        try:
            took[shape] = timed(shape, True)
        except Exception as error:  # of CUDA, or a shape that the kernel refuses
            _LOG.warning("%s cannot be timed: %s", shape, error)
    if not took:
        raise PliantError("no shape of the decode kernel can be timed")
    again = sorted(took, key=took.__getitem__)[:3]
    exact = {shape: timed(shape, False) for shape in again}
    rest = {shape: t for shape, t in took.items() if shape not in exact}
    ordered = sorted(exact, key=exact.__getitem__) + sorted(rest, key=rest.__getitem__)
    return {shape: (exact | rest)[shape] for shape in ordered}


def _tuned(
    code: GroupInt | GroupLevels, case: Case, gpu: Gpu, library: Any, terms: Terms,
    dtype: torch.dtype,
) -> Shape | None:  # fmt: skip
    """The fastest candidate, or the formula's, if none is clearly faster; None: none was timed."""
    shapes = candidates(case, gpu.multiprocessors, most_warps(library, case, code.device))
    try:
        with torch.inference_mode():
            took = fastest(shapes, timer(code, case.rows, library, terms, dtype))
        best = next(iter(took))
    except Exception as error:  # no memory for the copies, say
        _LOG.warning("the decode kernel is not tuned for %s: %s", case.key, error)
        return None
    chosen = best if took[best] < _GAIN * took.get(shapes[0], math.inf) else shapes[0]
    _LOG.info("the decode kernel is tuned for %s: %s", case.key, written(chosen))
    return chosen


def timer(
    code: GroupInt | GroupLevels, n: int, library: Any, terms: Terms, dtype: torch.dtype
) -> Callable[[Shape, bool], float]:
    """A function of `fastest`: products with copies of the code that no L2 cache holds together."""
    device = code.device
    about = torch.cuda.get_device_properties(device)
    wanted_bytes = 3 * int(getattr(about, "L2_cache_size", 50 << 20))
    stored = sum(plane.nbytes for plane in code.planes)
    copies = max(-(-wanted_bytes // stored) - 1, 0)
    if copies * stored > torch.cuda.mem_get_info(device)[0] // 4:
        raise PliantError("copies of its weights would take more than a quarter of the free memory")
    codes = [code]
    for _ in range(copies):
        codes.append(replace(code, planes=tuple(plane.clone() for plane in code.planes)))
        level_digits(codes[-1])  # found out now: not while a graph is captured
    x = torch.arange(n * code.width, device=device).sin().reshape(n, code.width).to(dtype)
    y = torch.empty(n, code.shape[0], dtype=dtype, device=device)
    if terms.factor is not None:  # the caller's scratch may be at work on its stream
        middle = torch.zeros(n, terms.factor.shape[1], device=device)
        counters = None if terms.counters is None else torch.zeros_like(terms.counters)
        terms = replace(terms, middle=middle, counters=counters)

    def timed(shape: Shape, short: bool) -> float:
        def launch(i: int) -> None:
            stream = torch.cuda.current_stream(device).cuda_stream
            multiply(x, codes[i], library, stream, shape, terms, y)

        with torch.cuda.device(device):
            return microseconds(launch, len(codes), short)

    return timed


def microseconds(
    launch: Callable[[int], Any], distinct: int, short: bool = False, launches: int = _LAUNCHES
) -> float:
    """Of one launch in a CUDA graph of many; `launch(i)` uses the i-th of `distinct` operands."""
    rounds = max(1, -(-launches // distinct))
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for i in range(min(2, distinct)):
            launch(i)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Not by torch.cuda.graph(), which collects garbage before each of a thousand captures.
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for _ in range(rounds):
                for i in range(distinct):
                    launch(i)
        finally:
            graph.capture_end()
        times = []
        for _ in range(4 if short else 12):
            begin, end = (_event() for _ in range(2))
            begin.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / (rounds * distinct))
    return float(statistics.median(times[1:]))


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
