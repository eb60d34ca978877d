"""Many sequences a pass: continuous batching over a paged cache with shared beginnings.

Sources: "Orca: A Distributed Serving System for Transformer-Based Generative Models" (requests come
and go between passes); "SARATHI: Efficient LLM Inference by Piggybacking Decodes with Chunked
Prefills" (a pass takes a token of every answer and a piece of a prompt).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pliant.cache import Chunk, OutOfPages, PagedModel, PagedSequence, PagePool, PrefixTree
from pliant.errors import PliantError
from pliant.plan.memory import PREFILL_CHUNK
from pliant.run.sampling import Score
from pliant.serve.engine import Answer
from pliant.serve.request import Reason, Request
from pliant.serve.threaded import MOST_WAITING, SCORED_CHUNK, ThreadedEngine, failure


class _Running:
    """A request on its pages.

    order: of coming in; the last comer gives way where pages are short. ahead: tokens that the
    model has yet to read, the last one made or what is left of a prompt. scoring: the prompt's
    tokens are still to be scored. weights: which the pages are of.
    """

    def __init__(self, answer: Answer, order: int, pool: PagePool) -> None:
        self.answer, self.order = answer, order
        self.ahead = list(answer.live.request.prompt)
        self.sequence = PagedSequence(pool)
        self.scoring = answer.live.request.score_prompt
        self.scores: list[Score] = []
        self.weights = 0

    @property
    def urgency(self) -> tuple[int, int]:
        """Lower first."""
        return self.answer.live.request.priority, self.order

    def begin(self, sequence: PagedSequence, weights: int) -> None:
        """Read what `sequence` does not hold."""
        self.sequence, self.weights = sequence, weights
        del self.ahead[: len(sequence)]

    def give_way(self) -> None:
        """Give all pages back, and read everything again later."""
        self.ahead = [*self.sequence.tokens, *self.ahead]
        self.scores.clear()
        self.sequence.release()


class BatchingEngine(ThreadedEngine):
    """Serves a RunningModel, its planned KV cache shared by all requests that run.

    Starts its thread at once; `close` ends it. Beginnings of text that were read before are read
    once, until the weights change. Where pages run short the request that came last waits again,
    and is read anew once there is room.
    """

    def __init__(self, model: Any, tokenizer: Any, most_waiting: int = MOST_WAITING) -> None:
        super().__init__(model, tokenizer, most_waiting)
        self._paged = PagedModel(model)
        device = model.get_input_embeddings().weight.device
        self.pool = PagePool(self._paged.shape, model.plan.breakdown.kv_cache, device)
        self._tree = PrefixTree(self.pool)
        self._running: list[_Running] = []
        self._again: list[_Running] = []  # that gave way: without pages, all tokens ahead
        self._came = self._weights = 0  # requests that came in, and changes of the weights
        self._short = False  # of pages in the last pass: nobody comes in before one succeeds
        self._thread.start()

    def _running_count(self) -> int:
        return len(self._running) + len(self._again)

    def _cache_bytes(self) -> int:
        return self.pool.nbytes

    def _resized(self) -> None:
        self._weights += 1
        self._tree.clear()  # keys and values of other weights are not for new requests

    def _turn(self) -> None:
        """One pass: a token more for every answer, and of unread prompts as much as it takes."""
        self._leave()
        self._admit()
        chunks = self._chunks()
        if not chunks:
            return
        every = chunks[0][0].scoring
        try:
            logits = self._paged([chunk for _, chunk in chunks], every)
        except OutOfPages as error:
            self._give_way(error)
            return
        except Exception as error:
            for running, _ in chunks:
                self._fail(running, error)
            return
        self._short = False
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

    def _admit(self) -> None:
        """Take in waiting requests, the most urgent first, while there is room for their tokens."""
        while (running := self._next()) is not None:
            try:
                self._check(running.answer.live.request)
            except PliantError as error:
                self._fail(running, error)
                continue
            if running.scoring:
                sequence = PagedSequence(self.pool)
            else:
                sequence = self._tree.start(running.ahead)
            running.begin(sequence, self._weights)
            self._running.append(running)
            live = running.answer.live
            if not live.made:
                live.cached = len(sequence)

    def _next(self) -> _Running | None:
        """Who comes in now: of those that gave way and those that wait; None: nobody can."""
        again = min(self._again, key=lambda running: running.urgency, default=None)
        with self._changed:
            waiting = self._queue.first()
            if again is None or (
                waiting is not None and waiting.live.request.priority < again.urgency[0]
            ):
                if waiting is None or self._is_read(waiting.live.request):
                    return None
                if not self._fits(waiting.live.request.prompt):
                    return None
                self._came += 1
                running = _Running(self._queue.pop(), self._came, self.pool)
                self._prompt_tokens += len(running.ahead)
                return running
        if not self._fits(again.ahead):
            return None
        self._again.remove(again)
        return again

    def _is_read(self, request: Request) -> bool:
        """Whether this very prompt is being read for another answer, which will share its pages."""
        return not request.score_prompt and any(
            running.answer.live.request.prompt is request.prompt and len(running.ahead) > 1
            for running in self._running
        )

    def _fits(self, tokens: Sequence[int]) -> bool:
        """Whether `tokens`, what is unread and a token more for each have room; or nobody runs."""
        if not self._running:
            return True
        if self._short:
            return False
        shape, stored = self.pool.shape, self._tree.match(tokens[:-1])
        idle = sum(page.data.nbytes for page in stored if page.holders == 1)  # not to be evicted
        pages = shape.pages(len(tokens) + 1) - len(stored)
        for running in self._running:
            ahead = len(running.sequence) + len(running.ahead) + 1
            pages += shape.pages(ahead) - len(running.sequence.pages)
        return pages * shape.nbytes() <= self.pool.free + self._tree.evictable - idle

    def _chunks(self) -> list[tuple[_Running, Chunk]]:
        """What the next pass takes; a prompt that is to be scored goes alone."""
        self._running.sort(key=lambda running: running.urgency)
        scored = next((running for running in self._running if running.scoring), None)
        if scored is not None:
            return [(scored, Chunk(scored.sequence, scored.ahead[:SCORED_CHUNK]))]
        room, chunks = PREFILL_CHUNK, []
        for running in self._running:
            count = len(running.ahead)
            if count > 1:
                count = min(count, room)
                room -= count
            if count:
                chunks.append((running, Chunk(running.sequence, running.ahead[:count])))
        return chunks

    def _advance(self, running: _Running, count: int, logits: Tensor) -> None:
        """The model has read `count` tokens more: `logits` [vocabulary], if scoring after each."""
        live, request = running.answer.live, running.answer.live.request
        del running.ahead[:count]
        if running.scoring:
            running.scores += live.scores(len(running.scores), logits)
            logits = logits[-1]
        if running.ahead:
            return
        if running.scoring:
            running.scoring = False
            running.answer.put(live.prompt(running.scores))
        if count > 1 and running.weights == self._weights:
            self._tree.insert(running.sequence)
        if not request.max_tokens:
            live.reason = "length"
        else:
            token, piece = live.next(logits, len(running.sequence) < self.context)
            running.ahead.append(token)
            self._counted()
            running.answer.put(piece)
        if live.reason is not None:
            self._end_of(running, live.reason)

    def _give_way(self, error: OutOfPages) -> None:
        """Take the last comer's pages; where nobody else is running, its answer ends."""
        last = max(self._running, key=lambda running: running.urgency)
        if len(self._running) == 1:
            self._fail(last, error)
            return
        self._short = True
        self._running.remove(last)
        self._again.append(last)
        last.give_way()

    def _fail(self, running: _Running, error: Exception) -> None:
        self._end_of(running, "error", failure(error))

    def _end_of(self, running: _Running, reason: Reason, message: str = "") -> None:
        for held in (self._running, self._again):
            if running in held:
                held.remove(running)
        running.sequence.release()
        running.answer.put(running.answer.live.finished(reason, message))
