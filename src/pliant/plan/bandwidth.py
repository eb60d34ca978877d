"""How fast this machine reads memory: the ceiling of decoding, where every weight is read once.

Measured once for each processor and kept in the cache directory.
"""

from __future__ import annotations

import platform
import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from pliant.plan import kept

_FILE = "bandwidth.json"
_BUFFER = 256 << 20  # far beyond any last-level cache's share of one process
_SECONDS = 0.5


@dataclass(frozen=True)
class Bandwidth:
    """bytes_per_second: the best sustained read rate. device: the processor that it is of."""

    device: str
    bytes_per_second: float


def bandwidth(device: str | torch.device | None = None, *, refresh: bool = False) -> Bandwidth:
    """This machine's memory bandwidth: of the GPU when there is one, else of the CPU.

    Read from the cache directory when it was measured before. refresh: measure again, and keep the
    larger: other work on the machine only ever lowers it.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    name = processor_name(place)
    known = _load()
    if refresh or name not in known:
        known[name] = max(known.get(name, 0.0), _measure(place))
        kept.write(_FILE, known)
    return Bandwidth(name, known[name])


def processor_name(device: torch.device) -> str:
    """Key of the cache: the processor's model and, for a CPU, the threads in use."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        name = found[1].strip() if found else name
    return f"{name}, {torch.get_num_threads()} threads"


def _measure(device: torch.device) -> float:
    """Bytes a second: the best of repeated passes over a buffer within half a second."""
    source = torch.ones(_BUFFER // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source) if device.type == "cuda" else None
    best, started = 0.0, time.perf_counter()
    while best == 0.0 or time.perf_counter() - started < _SECONDS:
        begin = time.perf_counter()
        if target is None:
            source.sum()
        else:
            target.copy_(source)
            torch.cuda.synchronize(device)
        moved = source.nbytes * (1 if target is None else 2)
        best = max(best, moved / (time.perf_counter() - begin))
    return best


def _load() -> dict[str, float]:
    try:
        return {name: float(value) for name, value in kept.read(_FILE).items()}
    except (TypeError, ValueError):
        return {}
