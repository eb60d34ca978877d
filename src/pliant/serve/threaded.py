"""What engines that compute in a thread of their own share: the queue, budgets, the way out."""

from __future__ import annotations

import asyncio
import logging
import threading
from abc import ABC, abstractmethod
from concurrent.futures import Future
from typing import Any

from pliant.errors import PliantError
from pliant.run.generate import context_of, end_tokens
from pliant.serve.engine import ASKED, Answer, ClosedError, FairQueue, Rate, Status
from pliant.serve.request import Live, Request

MOST_WAITING = 1024
SCORED_CHUNK = 8  # prompt tokens whose logits are held at once

_log = logging.getLogger(__name__)


def failure(error: Exception) -> str:
    """What a request is told that ends in `error`: a mistake in words, all else is for the log."""
    if isinstance(error, PliantError):
        return str(error)
    _log.error("a request failed", exc_info=error)
    return "the engine failed; its log says how"


class ThreadedEngine(ABC):
    """Serves a RunningModel from a thread, which an engine starts once it is made; `close` ends it.

    An engine says how it takes a turn, how many requests it runs and what its cache holds. Changes
    of the budget are made between turns, and wherever it calls `_resize`.
    """

    def __init__(self, model: Any, tokenizer: Any, most_waiting: int = MOST_WAITING) -> None:
        self.tokenizer, self._model = tokenizer, model
        self.context = context_of(model)
        self.vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
        self.end = end_tokens(model, tokenizer)
        self._queue = FairQueue(most_waiting)
        self._budgets: list[tuple[int, str, Future[Status]]] = []
        self._closing = False
        self._changed = threading.Condition()  # guards the three above
        self._prompt_tokens = self._new_tokens = 0
        self._rate = Rate()
        self._thread = threading.Thread(target=self._work, name="pliant-engine", daemon=True)

    def submit(self, request: Request) -> Answer:
        answer = Answer(Live(request, self.tokenizer, self.end), self._cancel)
        with self._changed:
            if self._closing:
                raise ClosedError("the server is shutting down")
            self._queue.push(answer)
            self._changed.notify()
        return answer

    def status(self) -> Status:
        with self._changed:
            waiting = len(self._queue)
        return Status(
            waiting=waiting,
            running=self._running_count(),
            prompt_tokens=self._prompt_tokens,
            new_tokens=self._new_tokens,
            tokens_per_second=self._rate.value(),
            **self._held(),
        )

    async def set_budget(self, memory: int, reason: str = ASKED) -> Status:
        done: Future[Status] = Future()
        with self._changed:
            if self._closing:
                raise ClosedError("the server is shutting down")
            self._budgets.append((memory, reason, done))
            self._changed.notify()
        return await asyncio.wrap_future(done)

    async def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        await asyncio.to_thread(self._thread.join)

    @abstractmethod
    def _turn(self) -> None:
        """Do some of what there is to do; nothing where there is nothing."""

    @abstractmethod
    def _running_count(self) -> int:
        """Requests that are computed now; from any thread."""

    @abstractmethod
    def _held(self) -> dict[str, Any]:
        """The fields of Status that tell of memory; from any thread."""

    def _idle_seconds(self) -> float | None:
        """How long to wait for something to do before a turn without; None: for ever."""
        return None

    def _cancel(self, answer: Answer) -> None:
        with self._changed:
            waited = self._queue.remove(answer)
        if waited:
            answer.put(answer.live.finished("cancelled"))

    def _work(self) -> None:
        while self._wait():
            self._resize()
            self._turn()

    def _wait(self) -> bool:
        """Until there may be something to do; False when there never will be."""
        with self._changed:
            if not self._busy() and not self._closing:
                self._changed.wait(self._idle_seconds())
            return self._busy() or not self._closing

    def _busy(self) -> bool:
        """Whether there is something to do."""
        return bool(len(self._queue) or self._budgets or self._running_count())

    def _check(self, request: Request) -> None:
        """Raise PliantError for a prompt that the context does not hold."""
        if len(request.prompt) > self.context:
            raise PliantError(
                f"the prompt has {len(request.prompt)} tokens and the context is {self.context}"
            )

    def _counted(self) -> None:
        """One more token of an answer."""
        self._new_tokens += 1
        self._rate.count()

    def _budgets_asked(self) -> list[tuple[int, str, Future[Status]]]:
        """Budgets that were asked for and are still wanted, in order."""
        with self._changed:
            budgets, self._budgets = self._budgets, []
        return [asked for asked in budgets if asked[2].set_running_or_notify_cancel()]

    def _resize(self) -> None:
        """Go to the budgets that were asked for."""
        for memory, _, done in self._budgets_asked():
            try:
                self._model.resize(memory=memory)
            except Exception as error:
                done.set_exception(error)
            else:
                done.set_result(self.status())
