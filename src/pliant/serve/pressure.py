"""Budgets that nobody asks for over HTTP: signals, and a machine that runs out of memory.

SIGUSR1 lowers the budget by a quarter, not below the least; SIGUSR2 brings back the one that was
asked for last. With `follow`, the budget is lowered as well while the memory of this process's
control group (version 2), or of the machine, is nearly used up or tasks stall for want of it, and
raised again, bit by bit, once there is room for a while.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pliant.budget import format_size
from pliant.errors import PliantError
from pliant.serve.engine import Engine

WATCH_SECONDS = 0.5
MARGIN = 64 << 20
"""Bytes that should stay free."""
STALLED = 10.0  # percent of time in which some task waited for memory, over ten seconds
CALM_SECONDS = 10.0  # of room before the budget is raised again


@dataclass(frozen=True)
class Machine:
    """What is left for this process. free: bytes. stalled: percent of time that tasks waited."""

    free: int
    stalled: float


def machine(root: Path = Path("/")) -> Machine | None:
    """Memory of this process's control group and of the machine; None where neither tells."""
    group = root / "sys/fs/cgroup" / _group(root)
    free = [size for size in (_group_free(group), _available(root)) if size is not None]
    stalls = (_stalled(group / "memory.pressure"), _stalled(root / "proc/pressure/memory"))
    return Machine(min(free), max(stalls)) if free else None


class Watch:
    """Changes the budget of `engine` from outside; enter it in the event loop of the main thread.

    follow: the memory of the machine too. look: tells it (for tests).
    """

    def __init__(
        self,
        engine: Engine,
        follow: bool = False,
        look: Callable[[], Machine | None] = machine,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if follow and look() is None:
            raise PliantError("this system does not tell how much memory is free; leave "
                              "--follow-cgroup out")  # fmt: skip
        self._engine, self._follow, self._look, self._clock = engine, follow, look, clock
        self._asked = self._set = engine.status().memory
        self._calm_since = clock()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Watch:
        if self._set is not None:
            loop = asyncio.get_running_loop()
            for number, change in ((signal.SIGUSR1, self.lower), (signal.SIGUSR2, self.restore)):
                loop.add_signal_handler(number, self._start, change)
            if self._follow:
                self._start(self._watch)
        return self

    async def __aexit__(self, *error: Any) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            loop.remove_signal_handler(number)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def lower(self) -> None:
        """A quarter less."""
        self._notice()
        await self._change(int((self._set or 0) * 0.75), "SIGUSR1")

    async def restore(self) -> None:
        """What was asked for last."""
        self._notice()
        await self._change(self._asked or 0, "SIGUSR2")

    async def follow(self) -> None:
        """Look once whether the machine has room, and act on it."""
        seen = self._look()
        self._notice()
        if seen is None or self._set is None or self._asked is None:
            return
        now = self._clock()
        if seen.free < MARGIN or seen.stalled > STALLED:
            self._calm_since = now
            by = max(2 * MARGIN - seen.free, self._set // 10)
            why = f"{format_size(seen.free)} free, tasks stall {seen.stalled:.0f}% of the time"
            await self._change(self._set - by, why)
        elif self._set >= self._asked or seen.free < 2 * MARGIN:
            self._calm_since = now
        elif now - self._calm_since >= CALM_SECONDS:
            self._calm_since = now
            by = (seen.free - MARGIN) // 2
            await self._change(min(self._set + by, self._asked), f"{format_size(seen.free)} free")

    def _notice(self) -> None:
        """See whether somebody else set a budget since."""
        memory = self._engine.status().memory
        if memory != self._set:
            self._asked = self._set = memory

    async def _change(self, memory: int, reason: str) -> None:
        memory = max(memory, self._engine.status().least)
        if memory == self._set:
            return
        self._set = memory
        with suppress(PliantError):  # it stays, and says so in the log of decisions
            await self._engine.set_budget(memory, reason)
        self._set = self._engine.status().memory

    async def _watch(self) -> None:
        while True:
            await self.follow()
            await asyncio.sleep(WATCH_SECONDS)

    def _start(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _group(root: Path) -> str:
    """The path of this process's control group."""
    for line in _lines(root / "proc/self/cgroup"):
        if line.startswith("0::"):
            return line[3:].lstrip("/")
    return ""


def _group_free(group: Path) -> int | None:
    """What a control group may still take; file pages that can go at once count as free."""
    limits = [int(text) for name in ("memory.max", "memory.high")
              for text in _lines(group / name)[:1] if text.isdecimal()]  # fmt: skip
    used = _lines(group / "memory.current")
    if not limits or not used:
        return None
    idle = _field(group / "memory.stat", "inactive_file")
    return max(min(limits) - int(used[0]) + (idle or 0), 0)


def _available(root: Path) -> int | None:
    kib = _field(root / "proc/meminfo", "MemAvailable:")
    return None if kib is None else kib * 1024


def _stalled(path: Path) -> float:
    for line in _lines(path):
        if line.startswith("some avg10="):
            return float(line.split()[1].removeprefix("avg10="))
    return 0.0


def _field(path: Path, name: str) -> int | None:
    for line in _lines(path):
        words = line.split()
        if words and words[0] == name:
            return int(words[1])
    return None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
