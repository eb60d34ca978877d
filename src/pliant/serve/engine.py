"""What HTTP asks of an engine, and what every engine needs to answer it."""

from __future__ import annotations

import asyncio
import heapq
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from pliant.errors import PliantError
from pliant.serve.request import Event, Finished, Live, Request

RATE_SECONDS = 5.0
ASKED = "PUT /v1/budget"


class QueueFullError(PliantError):
    """As many requests wait as may; the message says how many."""


class ClosedError(PliantError):
    """The engine takes no more requests: it is shutting down."""


@dataclass(frozen=True)
class Status:
    """What an engine does and holds, at one moment. Sizes are bytes.

    memory: the budget, None when only the weights are bounded. planned: everything at its peak.
    weights, cache: held of each. activations: set aside for them. least: the smallest budget that
    is taken; most: above it nothing more is gained. prompt_tokens, new_tokens: counts since the
    start. tokens_per_second: new ones, over the last seconds. damage, cache_damage: nats a token
    expected of the weights, and of the cache at the demand of now. pages: how many of each width in
    bits. moves: changes of the weights so far.
    """

    waiting: int
    running: int
    memory: int | None
    planned: int
    weights: int
    cache: int
    prompt_tokens: int
    new_tokens: int
    tokens_per_second: float
    activations: int = 0
    free: int = 0
    least: int = 0
    most: int = 0
    damage: float | None = None
    cache_damage: float | None = None
    pages: Mapping[int, int] = field(default_factory=dict)
    moves: int = 0


class Engine(Protocol):
    """Runs requests. Its methods are called from the event loop, and none of them blocks it.

    tokenizer: of transformers. context: tokens that a prompt and its answer may have together.
    vocabulary: token ids are below it. end: tokens that end an answer.
    """

    tokenizer: Any
    context: int
    vocabulary: int
    end: frozenset[int]

    def submit(self, request: Request) -> Answer:
        """Queue a request. Raises QueueFullError or ClosedError."""
        ...

    def status(self) -> Status: ...

    async def set_budget(self, memory: int, reason: str = ASKED) -> Status:
        """Go to another total in bytes; returns once it holds. Raises BudgetError, and stays.

        reason: why, for the log of decisions.
        """
        ...

    async def close(self) -> None:
        """Take no more requests, finish those that were taken, let go of everything."""
        ...


class Answer(AsyncIterator[Event]):
    """Events of one request, in order; the last one is Finished. Iterate it once.

    Events wait here for a slow reader, and hold up nobody else. live: what the engine knows of it.
    """

    def __init__(self, live: Live, cancel: Callable[[Answer], None]) -> None:
        self.live, self.cancelled = live, False
        self._cancel = cancel
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._over = False

    def put(self, event: Event) -> None:
        """One more event; from any thread. Without a reader (its loop is gone) it is dropped."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def cancel(self) -> None:
        """Stop as soon as possible: nothing is computed for this request any more."""
        if not self.cancelled:
            self.cancelled = True
            self._cancel(self)

    async def __anext__(self) -> Event:
        if self._over:
            raise StopAsyncIteration
        event = await self._events.get()
        self._over = isinstance(event, Finished)
        return event


class FairQueue:
    """Answers that wait: the lowest priority first, then the one that came first."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._heap: list[tuple[int, int, Answer]] = []
        self._arrived = 0

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, answer: Answer) -> None:
        if len(self._heap) >= self.most:
            raise QueueFullError(f"{self.most} requests wait already; try again later")
        self._arrived += 1
        heapq.heappush(self._heap, (answer.live.request.priority, self._arrived, answer))

    def ahead(self, count: int) -> list[Answer]:
        """The first so many that `pop` would take, in order."""
        return [entry[2] for entry in heapq.nsmallest(count, self._heap)]

    def first(self) -> Answer | None:
        """What `pop` would take."""
        return self._heap[0][2] if self._heap else None

    def pop(self) -> Answer:
        return heapq.heappop(self._heap)[2]

    def remove(self, answer: Answer) -> bool:
        """Take `answer` out; False if it was not in."""
        kept = [entry for entry in self._heap if entry[2] is not answer]
        removed = len(kept) < len(self._heap)
        if removed:
            heapq.heapify(kept)
            self._heap = kept
        return removed


class Rate:
    """Events a second over the last RATE_SECONDS."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._seen = clock, deque[float]()

    def count(self) -> None:
        """One more, now; from one thread."""
        now = self._clock()
        self._seen.append(now)
        while self._seen[0] < now - RATE_SECONDS:
            self._seen.popleft()

    def value(self) -> float:
        """From any thread."""
        since = self._clock() - RATE_SECONDS
        return sum(when >= since for when in list(self._seen)) / RATE_SECONDS
