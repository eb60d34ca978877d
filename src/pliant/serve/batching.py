"""Many sequences a pass: continuous batching over a paged cache with shared beginnings.

Sources: "Orca: A Distributed Serving System for Transformer-Based Generative Models" (requests come
and go between passes); "SARATHI: Efficient LLM Inference by Piggybacking Decodes with Chunked
Prefills" (a pass takes a token of every answer and a piece of a prompt).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from torch import Tensor

from pliant.cache import Chunk, OutOfPages, PagedSequence, PagePool
from pliant.errors import PliantError
from pliant.plan.memory import PREFILL_CHUNK
from pliant.run.packed import PackedModel
from pliant.serve.decisions import Decision, DecisionLog
from pliant.serve.engine import Status
from pliant.serve.request import Reason, Request
from pliant.serve.room import SHARE_DAMAGE, SLICE_SECONDS, Room
from pliant.serve.running import Running
from pliant.serve.threaded import MOST_WAITING, SCORED_CHUNK, ThreadedEngine, failure

MOST_RUNNING = 16
OVER_SECONDS = 0.4
"""How long a lowered budget may be exceeded before all moves are made at once, and requests give
way."""

SHARED_TOKENS = 32
"""A request waits for another that begins alike where it saves reading so many tokens."""

_IDLE_SECONDS = 0.5  # between two looks whether the weights can grow
_ANSWER_TOKENS = 128.0  # that an answer is thought to have, before any has ended


class BatchingEngine(ThreadedEngine):
    """Serves a RunningModel; its weights and the pages of all requests share one budget.

    Starts its thread at once; `close` ends it. memory: the budget in bytes; without it, what the
    model was opened for. most: requests that run at once. swap: a directory for the pages of
    requests that give way. See Room for the other options. Beginnings of text that were read before
    are read once, until the weights change. Where pages run short the request that came last waits
    again, and goes on once there is room.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        memory: int | None = None,
        *,
        most: int = MOST_RUNNING,
        most_waiting: int = MOST_WAITING,
        share_damage: float = SHARE_DAMAGE,
        fixed: bool = False,
        swap: Path | None = None,
    ) -> None:
        super().__init__(model, tokenizer, most_waiting)
        self._packed = PackedModel(model)
        self._log = DecisionLog()
        self.room = Room(model, memory, most, self._log, share_damage, fixed)
        self._swap = swap
        self._running: list[Running] = []
        self._again: list[Running] = []  # that gave way: without pages
        self._came = 0
        self._short = False  # of pages in the last pass: nobody comes in before one succeeds
        self._asked: list[Future[Status]] = []  # budgets that are not met yet
        self._over_since = 0.0
        self._pace = SLICE_SECONDS  # seconds of the last pass
        self._answer_tokens = _ANSWER_TOKENS
        self._thread.start()

    @property
    def pool(self) -> PagePool:
        return self.room.pool

    def decisions(self, since: int = 0) -> list[Decision]:
        return self._log.since(since)

    def _turn(self) -> None:
        """One pass: a token more for every answer, and of unread prompts as much as it takes."""
        self._leave()
        self._govern()
        self._admit()
        chunks = self._chunks()
        if not chunks or not self._room_for([chunk for _, chunk in chunks]):
            return
        every, began = chunks[0][0].scoring, time.monotonic()
        try:
            logits = self._packed([chunk for _, chunk in chunks], every)
        except OutOfPages as error:  # the machine has less than the budget
            self._give_way(error)
            return
        except Exception as error:
            for running, _ in chunks:
                self._fail(running, error)
            return
        self._short, self._pace = False, max(time.monotonic() - began, SLICE_SECONDS)
        for (running, chunk), after in zip(chunks, [logits] if every else logits, strict=True):
            try:
                self._advance(running, len(chunk.tokens), after)
            except Exception as error:  # of one request, say its sampler's
                self._fail(running, error)

    def _leave(self) -> None:
        """Let go of requests that were cancelled."""
        for running in [*self._running, *self._again]:
            if running.answer.cancelled:
                self._end_of(running, "cancelled")

    def _govern(self) -> None:
        """Let memory move between weights and pages; answer to budgets that were asked for."""
        self.room.govern(self._wanted, self._pace)
        if self.room.over:
            self._shed()
        else:
            self._over_since = 0.0
        if self._asked and not self.room.sinking:
            for done in self._asked:
                done.set_result(self.status())
            self._asked.clear()

    def _shed(self) -> None:
        """Come down to a budget that was lowered; requests give way where nothing else helps."""
        now = time.monotonic()
        self._over_since = self._over_since or now
        if now - self._over_since < OVER_SECONDS:
            self.room.make(0, self._coldest(), self._pace)
            return
        self.room.hurry(self._wanted)
        while not self.room.make(0, self._coldest()) and self._running:
            self._step_aside("the budget was lowered")

    def _admit(self) -> None:
        """Take in waiting requests, the most urgent first, while there is room for their tokens."""
        while (running := self._next()) is not None:
            try:
                self._check(running.answer.live.request)
                self._begin(running)
            except OutOfPages:  # of one that was swapped out
                self._again.append(running)
                return
            except PliantError as error:
                self._fail(running, error)

    def _begin(self, running: Running) -> None:
        if running.swapped:
            running.swap_in()
        elif running.scoring:
            running.begin(PagedSequence(self.pool), self.room.version)
        else:
            running.begin(self.room.tree.start(running.ahead), self.room.version)
        self._running.append(running)
        live = running.answer.live
        if not live.made:
            live.cached = len(running.sequence)

    def _next(self) -> Running | None:
        """Who comes in now: of those that gave way and those that wait; None: nobody can."""
        again = min(self._again, key=lambda running: running.urgency, default=None)
        with self._changed:
            waiting = self._queue.first()
            if again is None or (
                waiting is not None and waiting.live.request.priority < again.urgency[0]
            ):
                if waiting is None or self._is_read(waiting.live.request):
                    return None
                found = Running(waiting, self._came + 1, self.pool)
                if not self._fits(found):
                    return None
                self._queue.pop()
                self._came += 1
                self._prompt_tokens += len(found.ahead)
                return found
        if not self._fits(again):
            return None
        self._again.remove(again)
        return again

    def _is_read(self, request: Request) -> bool:
        """Whether the beginning of this prompt is being read for another one, and worth waiting
        for: its pages will be shared.
        """
        return not request.score_prompt and any(
            running.unread > 1
            and _common(running.answer.live.request.prompt, request.prompt)
            >= len(running.sequence) + SHARED_TOKENS
            for running in self._running
            if not running.scoring
        )

    def _fits(self, coming: Running) -> bool:
        """Whether one more may run, and what is unread and a token more for each has room."""
        if not self._running:
            return True
        if self._short or self.room.over or len(self._running) >= self.room.most:
            return False
        if not self.room.admits(*self._lengths([*self._running, coming])):
            return False
        shape = self.pool.shape
        stored = [] if coming.swapped else self.room.tree.match(coming.ahead[:-1])
        idle = sum(page.data.nbytes for page in stored if page.holders == 1)  # not to be evicted
        pages = shape.pages(coming.length + 1) - len(stored)
        for running in self._running:
            pages += shape.pages(running.length + 1) - len(running.sequence.pages)
        return pages * shape.nbytes() <= self.room.could_make(self._coldest()) - idle

    def _wanted(self) -> tuple[list[int], int]:
        """Lengths of what runs and of what waits and could run, and tokens that they share."""
        wanted = [*self._running, *self._again]
        found = self._lengths(wanted)
        with self._changed:
            waiting = self._queue.ahead(self.room.most - len(wanted))
        for answer in waiting:
            wanted.append(Running(answer, 0, self.pool))
            more = self._lengths(wanted)
            if not self.room.admits(*more):
                break
            found = more
        return found

    def _lengths(self, requests: Sequence[Running]) -> tuple[list[int], int]:
        pages = [id(page) for running in requests for page in running.sequence.pages]
        shared = (len(pages) - len(set(pages))) * self.pool.shape.tokens
        lengths = [each.expected(self._answer_tokens, self.context) for each in requests]
        return lengths, shared

    def _chunks(self) -> list[tuple[Running, Chunk]]:
        """What the next pass takes; a prompt that is to be scored goes alone."""
        self._running.sort(key=lambda running: running.urgency)
        scored = next((running for running in self._running if running.scoring), None)
        if scored is not None:
            return [(scored, Chunk(scored.sequence, scored.ahead[:SCORED_CHUNK]))]
        room, chunks = PREFILL_CHUNK, []
        for running in self._running:
            unread = running.unread
            count = min(unread, room) if unread else 1
            room -= count if unread else 0
            if count:
                piece = Chunk(running.sequence, running.ahead[:count], decode=not unread)
                chunks.append((running, piece))
        return chunks

    def _advance(self, running: Running, count: int, logits: Tensor) -> None:
        """The model has read `count` tokens more: `logits` [vocabulary], if scoring after each."""
        live, request = running.answer.live, running.answer.live.request
        running.note(self.room.version)
        del running.ahead[:count]
        if len(running.sequence) <= len(request.prompt) and running.version is not None:
            self.room.tree.insert(running.sequence)
        if running.scoring:
            running.scores += live.scores(len(running.scores), logits)
            logits = logits[-1]
        if running.ahead:
            return
        if running.scoring:
            running.scoring = False
            running.answer.put(live.prompt(running.scores))
        if not request.max_tokens:
            live.reason = "length"
        else:
            token, piece = live.next(logits, len(running.sequence) < self.context)
            running.ahead.append(token)
            self._counted()
            running.answer.put(piece)
        if live.reason is not None:
            self._end_of(running, live.reason)

    def _room_for(self, chunks: Sequence[Chunk]) -> bool:
        """Have pages for a pass: code cold ones, shrink the weights, or let the last comer wait."""
        wanted = sum(chunk.sequence.wants(len(chunk.tokens)) for chunk in chunks)
        if self.room.make(wanted, self._coldest()):
            return True
        if self.room.hurry(self._wanted) and self.room.make(wanted, self._coldest()):
            return True
        self._give_way(OutOfPages(wanted, self.pool.free))
        return False

    def _give_way(self, error: OutOfPages) -> None:
        """The last comer waits; where nobody else is running, its answer ends."""
        if len(self._running) == 1:
            self._fail(self._running[0], error)
            return
        self._short = True
        self._step_aside("pages are short")

    def _step_aside(self, reason: str) -> None:
        """The last comer gives all its pages back."""
        last = max(self._running, key=lambda running: running.urgency)
        self._running.remove(last)
        self._again.append(last)
        self._log.add(f"request {last.order} {last.give_way(self._swap)}", reason)

    def _coldest(self) -> list[PagedSequence]:
        """Sequences of what runs, those first whose pages are coded first."""
        some = sorted(self._running, key=lambda running: running.urgency, reverse=True)
        return [running.sequence for running in some]

    def _fail(self, running: Running, error: Exception) -> None:
        self._end_of(running, "error", failure(error))

    def _end_of(self, running: Running, reason: Reason, message: str = "") -> None:
        for held in (self._running, self._again):
            if running in held:
                held.remove(running)
        live = running.answer.live
        live.resized = running.resized()
        running.release()
        if reason in ("stop", "length"):
            self._answer_tokens += (live.made - self._answer_tokens) / 16
        running.answer.put(live.finished(reason, message))

    def _resize(self) -> None:
        """Take the budgets that were asked for, in order; `_govern` tells when one holds."""
        for memory, reason, done in self._budgets_asked():
            try:
                self.room.set_memory(memory, reason)
            except PliantError as error:
                done.set_exception(error)
            else:
                self._asked.append(done)

    def _busy(self) -> bool:
        return super()._busy() or bool(self._asked) or self.room.sinking

    def _idle_seconds(self) -> float | None:
        return _IDLE_SECONDS if self.room.could_grow else None

    def _running_count(self) -> int:
        return len(self._running) + len(self._again)

    def _held(self) -> dict[str, Any]:
        return self.room.status()


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens that both begin with."""
    if first[:SHARED_TOKENS] != second[:SHARED_TOKENS]:
        return 0
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
