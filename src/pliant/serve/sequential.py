"""One sequence at a time, in one thread: the engine that needs nothing but a running model."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from torch import Tensor

from pliant.errors import PliantError
from pliant.plan.memory import PREFILL_CHUNK
from pliant.run.generate import Memory, end_tokens, pieces
from pliant.run.sampling import Score
from pliant.serve.engine import Answer, ClosedError, FairQueue, Rate, Status
from pliant.serve.request import Finished, Live, Request

SCORED_CHUNK = 8  # prompt tokens whose logits are held at once
MOST_WAITING = 1024

_log = logging.getLogger(__name__)


class SequentialEngine:
    """Serves a RunningModel. Starts its thread at once; `close` ends it.

    Between two tokens, or two chunks of a prompt, it looks whether the request was cancelled and
    whether the budget is to change. Keys and values of a prompt are kept for the next request that
    begins the same; those of an answer are computed again when it comes back in a prompt, because
    decoding rounds otherwise and the same request should get the same answer.
    """

    def __init__(self, model: Any, tokenizer: Any, most_waiting: int = MOST_WAITING) -> None:
        self.tokenizer, self._model = tokenizer, model
        self._memory = Memory(model)
        self.context = self._memory.context
        self.vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
        self._end = end_tokens(model, tokenizer)
        self._queue = FairQueue(most_waiting)
        self._running: Answer | None = None
        self._budgets: list[tuple[int, Future[Status]]] = []
        self._closing = False
        self._changed = threading.Condition()  # guards the four above
        self._read_tokens = 0  # of those in the memory: read in a prompt, not made
        self._prompt_tokens = self._new_tokens = 0
        self._rate = Rate()
        self._thread = threading.Thread(target=self._work, name="pliant-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Answer:
        answer = Answer(Live(request, self.tokenizer, self._end), self._cancel)
        with self._changed:
            if self._closing:
                raise ClosedError("the server is shutting down")
            self._queue.push(answer)
            self._changed.notify()
        return answer

    def status(self) -> Status:
        plan = self._model.plan
        with self._changed:
            waiting, running = len(self._queue), int(self._running is not None)
        return Status(
            waiting=waiting,
            running=running,
            memory=plan.memory,
            planned=plan.planned_bytes,
            weights=plan.weight_bytes,
            cache=self._memory.cache.nbytes,
            prompt_tokens=self._prompt_tokens,
            new_tokens=self._new_tokens,
            tokens_per_second=self._rate.value(),
        )

    async def set_budget(self, memory: int) -> Status:
        done: Future[Status] = Future()
        with self._changed:
            if self._closing:
                raise ClosedError("the server is shutting down")
            self._budgets.append((memory, done))
            self._changed.notify()
        return await asyncio.wrap_future(done)

    async def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        await asyncio.to_thread(self._thread.join)

    def _cancel(self, answer: Answer) -> None:
        with self._changed:
            waited = self._queue.remove(answer)
        if waited:
            answer.put(answer.live.finished("cancelled"))

    def _work(self) -> None:
        while self._wait():
            self._resize()
            with self._changed:
                self._running = self._queue.pop() if len(self._queue) else None
            answer = self._running
            if answer is not None:
                last = self._answer(answer)
                self._running = None
                answer.put(last)

    def _wait(self) -> bool:
        """Until there is something to do; False when there never will be."""
        with self._changed:
            while not (len(self._queue) or self._budgets or self._closing):
                self._changed.wait()
            return bool(len(self._queue) or self._budgets)

    def _answer(self, answer: Answer) -> Finished:
        """Run a request to its end; what came of it."""
        live = answer.live
        try:
            logits = self._read(answer)
            if logits is not None and not live.request.max_tokens:
                live.reason = "length"
            while logits is not None and live.reason is None:
                room = len(self._memory.tokens) < self.context
                token, piece = live.next(logits, room)
                self._new_tokens += 1
                self._rate.count()
                answer.put(piece)
                if live.reason is None:
                    logits = self._step(answer, [token])
            return live.finished(live.reason or "cancelled")
        except PliantError as error:
            self._memory.forget()
            return live.finished("error", str(error))
        except Exception:
            self._memory.forget()
            _log.exception("a request failed")
            return live.finished("error", "the engine failed; its log says how")

    def _read(self, answer: Answer) -> Tensor | None:
        """Take the prompt in; the logits after it, None when cancelled."""
        live, request = answer.live, answer.live.request
        if len(request.prompt) > self.context:
            raise PliantError(
                f"the prompt has {len(request.prompt)} tokens and the context is {self.context}"
            )
        if request.score_prompt:
            self._memory.forget()
            return self._read_scored(answer)
        prompt = request.prompt
        live.cached = self._memory.common(prompt, max(min(self._read_tokens, len(prompt) - 2), 0))
        self._prompt_tokens += len(prompt)
        logits: Tensor | None = None
        for piece in pieces(prompt[live.cached :], PREFILL_CHUNK):
            logits = self._step(answer, piece)
            if logits is None:
                break
        self._read_tokens = len(self._memory.tokens)
        return logits

    def _read_scored(self, answer: Answer) -> Tensor | None:
        """The same, telling the score of every token of the prompt."""
        live, prompt = answer.live, answer.live.request.prompt
        self._prompt_tokens += len(prompt)
        scores: list[Score] = []
        logits: Tensor | None = None
        for piece in pieces(prompt, SCORED_CHUNK):
            if self._interrupted(answer):
                return None
            after = self._memory.extend_all(piece)
            scores += [
                Score.of(row, token, live.request.logprobs or 0)
                for row, token in zip(after, prompt[len(scores) + 1 :], strict=False)
            ]
            logits = after[-1].clone()
        self._read_tokens = len(prompt)
        answer.put(live.prompt(scores))
        return logits

    def _step(self, answer: Answer, tokens: Sequence[int]) -> Tensor | None:
        """Logits after `tokens` more, None when cancelled meanwhile."""
        return None if self._interrupted(answer) else self._memory.extend(tokens)

    def _interrupted(self, answer: Answer) -> bool:
        """Do what was asked for in the meantime; whether the answer is not wanted any more."""
        self._resize()
        return answer.cancelled

    def _resize(self) -> None:
        """Go to the budgets that were asked for, in order."""
        with self._changed:
            budgets, self._budgets = self._budgets, []
        for memory, done in budgets:
            if not done.set_running_or_notify_cancel():
                continue
            try:
                self._model.resize(memory=memory)
            except Exception as error:
                done.set_exception(error)
            else:
                done.set_result(self.status())
