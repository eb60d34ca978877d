"""Work beside other work: writing what is finished, reading what is needed later."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Thread
from types import TracebackType
from typing import TypeVar

import torch

T = TypeVar("T")


def ahead(call: Callable[[], T]) -> Future[T]:
    """What `call` will return or raise. A process that ends for another reason does not wait."""
    found: Future[T] = Future()

    def run() -> None:
        try:
            found.set_result(call())
        except BaseException as error:
            found.set_exception(error)

    Thread(target=run, daemon=True).start()
    return found


class Background:
    """Runs jobs in the order in which they come, at most one at a time, in a thread of its own.

    So what one job leaves on disk is there before the next begins, and what waits in memory is one
    job's. Errors of a job are raised where the next one is given, or asked for (`check`). On the
    way out of the context the last one is waited for, after an error or an interruption too: what
    it writes is work that need not be done again.

    Only beside a GPU: on a CPU both would take the same memory, and each job runs where it is
    given. A job reads what the device was given to compute before it, not after.
    """

    def __init__(self, device: torch.device, threaded: bool | None = None) -> None:
        if threaded is None:
            threaded = device.type == "cuda"
        self._pool = ThreadPoolExecutor(1) if threaded else None
        self._last: Future[None] | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

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
            ready = None
            if self._stream is not None:
                ready = torch.cuda.current_stream(self._stream.device).record_event()
            self._last = self._pool.submit(self._beside, job, ready)

    def _beside(self, job: Callable[[], None], ready: torch.cuda.Event | None) -> None:
        """Run a job without waiting for what the device was given after `ready`."""
        if self._stream is None or ready is None:
            job()
            return
        with torch.cuda.device(self._stream.device), torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            try:
                job()
            finally:
                self._stream.synchronize()  # its memory is the other stream's again

    def check(self) -> None:
        """Raise what the last job has failed with, if it has."""
        if self._last is not None and self._last.done():
            self._raise()

    def _raise(self) -> None:
        """Wait for the last job, and raise its error once."""
        last, self._last = self._last, None
        if last is not None:
            last.result()
