"""What was decided about memory, and why: for the log, the dashboard and whoever asks."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass

KEPT = 1000

_log = logging.getLogger("pliant.serve.decisions")


@dataclass(frozen=True)
class Decision:
    """id: from 1, rising. at: Unix seconds. what: was done. reason: why."""

    id: int
    at: float
    what: str
    reason: str


class DecisionLog:
    """The last KEPT decisions; from any thread."""

    def __init__(self) -> None:
        self._made: deque[Decision] = deque(maxlen=KEPT)
        self._lock = threading.Lock()
        self._count = 0

    def add(self, what: str, reason: str) -> None:
        with self._lock:
            self._count += 1
            self._made.append(Decision(self._count, time.time(), what, reason))
        _log.info("%s: %s", what, reason)

    def since(self, id: int) -> list[Decision]:
        """Those after the one with this id, oldest first."""
        with self._lock:
            return [decision for decision in self._made if decision.id > id]
