"""Memory as it is: resident bytes of a process, and bytes of a model's tensors."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from torch import Tensor, nn

_POLL_SECONDS = 0.005


def resident_bytes(pid: int | None = None) -> int:
    """Resident set of a process now; of this one by default."""
    return int(psutil.Process(pid).memory_info().rss)


def peak_resident_bytes(pid: int | None = None) -> int:
    """The largest resident set since the process began or `reset_peak`."""
    status = Path(f"/proc/{pid or 'self'}/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    process = psutil.Process(pid).memory_info()
    return int(getattr(process, "peak_wset", process.rss))


def reset_peak() -> bool:
    """Begin a new peak at what is resident now; False where the system does not permit it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


@dataclass(frozen=True)
class Growth:
    """Resident bytes before a piece of work, at its peak and after it."""

    before: int
    peak: int
    after: int

    @property
    def bytes(self) -> int:
        """How far the work's peak is above what was resident before."""
        return self.peak - self.before


def growth_of(work: Callable[[], Any]) -> Growth:
    """Run `work` in this process and watch its resident bytes."""
    before = resident_bytes()
    if not reset_peak():
        before = max(before, peak_resident_bytes())
    work()
    return Growth(before, max(peak_resident_bytes(), before), resident_bytes())


@dataclass(frozen=True)
class ChildRun:
    """How a child process ended, and its largest resident set."""

    returncode: int
    peak: int
    stdout: str
    stderr: str


def run_child(command: Sequence[str], **options: Any) -> ChildRun:
    """Run `command` and follow its peak until it ends (its last 5 ms may be missed)."""
    peak = 0
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    ) as child:
        output: tuple[str, str] | None = None
        while output is None:
            try:
                peak = max(peak, peak_resident_bytes(child.pid))
            except (OSError, psutil.Error):
                time.sleep(0)
            try:
                output = child.communicate(timeout=_POLL_SECONDS)
            except subprocess.TimeoutExpired:
                continue
    return ChildRun(child.returncode, peak, *output)


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights: parameters, stored buffers and codes, shared storage once."""
    seen: dict[tuple[str, int], int] = {}
    for tensor in _tensors(model):
        storage = tensor.untyped_storage()
        if tensor.device.type == "meta" or not storage.nbytes():
            continue
        seen[str(tensor.device), storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield buffer
        for value in vars(module).values():
            held = getattr(value, "tensors", None)
            if callable(held):
                yield from held().values()
