"""Seconds of one call, with what it reads too much for the last-level cache."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pliant.codes import Code, RowStack, from_tensors
from pliant.kernels import cpu, matmul
from pliant.kernels.cpu import integer_activations
from pliant.kernels.cpu.structs import describe
from pliant.kernels.streams import aside

Timer = Callable[[list[Code], Tensor, float], float]

_SAMPLE = 1e-3  # seconds: far above the clock's step, below what another process takes at once
_LONG_SAMPLE = 1e-2  # far above what it takes to wake threads
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_PART = 16  # one code in so many tells how many fill a sample
_MOST_COPIES = 1024
_UNKNOWN_CACHE = 32 << 20


def time_product(codes: list[Code], x: Tensor, seconds: float) -> float:
    """Of x times one of `codes`, one after the other, so that none is met again soon."""
    return time_calls(lambda turn: matmul(x, codes[turn % len(codes)]), seconds, x.device)


def time_in_step(codes: list[Code], x: Tensor, seconds: float) -> float:
    """Of x times one of `codes`, as a part of a longer native call, or of a CUDA graph.

    Many of them below each other in one call: in a step, threads are awake already.
    """
    if x.is_cuda:
        return _time_in_graph(codes, x, seconds)
    with integer_activations():
        some = max(1, len(codes) // _PART)
        first = _described(codes[:some])
        began = time.perf_counter()
        cpu.group_int(x, first)
        each = max(time.perf_counter() - began, 1e-9) / some
        size = min(len(codes), max(1, round(_LONG_SAMPLE / each)))
        count = len(codes) // size
        stacks = [_described(codes[i * size : (i + 1) * size]) for i in range(count)]

        def call(turn: int) -> Tensor:
            return cpu.group_int(x, stacks[turn % len(stacks)])

        return time_calls(call, seconds, x.device) / size


@torch.inference_mode()
def _time_in_graph(codes: list[Code], x: Tensor, seconds: float) -> float:
    """Of x times one of `codes`: all of them one after the other in one CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with aside(x.device) as stream:
        for code in codes:  # compiles; finds out what a code is, for which the GPU is waited for
            matmul(x, code)
        with torch.cuda.graph(graph, stream=stream):
            for code in codes:
                matmul(x, code)
    return time_calls(lambda turn: graph.replay(), seconds, x.device) / len(codes)


def _described(codes: list[Code]) -> RowStack:
    """`codes` below each other, known to the native kernels before a clock runs."""
    stack = RowStack(tuple(codes))
    describe(stack)
    return stack


@torch.inference_mode()
def time_calls(
    call: Callable[[int], object],
    seconds: float,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Seconds of `call(turn)`: the lower quartile of at least five samples within `seconds`.

    Other processes only ever add time, so the lower part of the samples is the machine's own.
    """
    turns = itertools.count()
    call(next(turns))  # compiles, allocates, wakes threads
    began = now(device, clock)
    call(next(turns))
    each = max(now(device, clock) - began, 1e-9)
    calls = max(1, int(_SAMPLE / each))
    samples: list[float] = []
    began = clock()
    while len(samples) < 5 or clock() - began < seconds:
        start = now(device, clock)
        for _ in range(calls):
            call(next(turns))
        samples.append((now(device, clock) - start) / calls)
    return quartile(samples)


def quartile(samples: list[float]) -> float:
    return sorted(samples)[(len(samples) - 1) // 4]


def now(device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """The time when all that was asked of `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock()


def copies(code: Code, nbytes: int) -> list[Code]:
    """`code` and as many copies of it, in memory of their own, as take `nbytes` together.

    No more than a thousand: so many small ones are a model that a cache holds in any case.
    """
    wanted = min(_MOST_COPIES, max(1, -(-nbytes // max(code.nbytes, 1))))
    meta, tensors = code.meta(), code.tensors()
    return [code] + [
        from_tensors(meta, {k: v.clone() for k, v in tensors.items()}) for _ in range(wanted - 1)
    ]


def beyond_cache(device: torch.device) -> int:
    """Bytes of which the last-level cache keeps no useful part: twice its size."""
    if device.type == "cuda":
        return 2 * int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [_cache_bytes(path) for path in _CACHES.glob("index*/size")]
    return 2 * max(sizes, default=_UNKNOWN_CACHE)


def _cache_bytes(path: Path) -> int:
    found = re.fullmatch(r"(\d+)([KMG]?)", path.read_text().strip())
    return int(found[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[found[2]] if found else 0
