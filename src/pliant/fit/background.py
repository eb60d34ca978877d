"""Writing what is finished while the next is computed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType


class Background:
    """Runs jobs in the order in which they come, at most one at a time, in a thread of its own.

    So what one job leaves on disk is there before the next begins, and what waits in memory is one
    job's. Errors of a job are raised where the next one is given, or asked for (`check`). Not
    `threaded`: each runs where it is given. On the way out of the context the last one is waited
    for, after an error or an interruption too: what it writes is work that need not be done again.
    """

    def __init__(self, threaded: bool = True) -> None:
        self._pool = ThreadPoolExecutor(1) if threaded else None
        self._last: Future[None] | None = None

    def __enter__(self) -> Background:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown()
        if kind is None:
            self._raise()

    def run(self, job: Callable[[], None]) -> None:
        """Begin `job` once the one before has ended well."""
        self._raise()
        if self._pool is None:
            job()
        else:
            self._last = self._pool.submit(job)

    def check(self) -> None:
        """Raise what the last job has failed with, if it has."""
        if self._last is not None and self._last.done():
            self._raise()

    def _raise(self) -> None:
        """Wait for the last job, and raise its error once."""
        last, self._last = self._last, None
        if last is not None:
            last.result()
