"""One sequence at a time, in one thread: the engine that needs nothing but a running model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pliant.plan.memory import PREFILL_CHUNK
from pliant.run.generate import Memory, pieces
from pliant.run.sampling import Score
from pliant.serve.engine import Answer
from pliant.serve.request import Finished
from pliant.serve.threaded import MOST_WAITING, SCORED_CHUNK, ThreadedEngine, failure


class SequentialEngine(ThreadedEngine):
    """Serves a RunningModel. Starts its thread at once; `close` ends it.

    Between two tokens, or two chunks of a prompt, it looks whether the request was cancelled and
    whether the budget is to change. Keys and values of a prompt are kept for the next request that
    begins the same; those of an answer are computed again when it comes back in a prompt, because
    decoding rounds otherwise and the same request should get the same answer.
    """

    def __init__(self, model: Any, tokenizer: Any, most_waiting: int = MOST_WAITING) -> None:
        super().__init__(model, tokenizer, most_waiting)
        self._memory = Memory(model)
        self._running: Answer | None = None
        self._read_tokens = 0  # of those in the memory: read in a prompt, not made
        self._thread.start()

    def _running_count(self) -> int:
        return int(self._running is not None)

    def _held(self) -> dict[str, Any]:
        plan = self._model.plan
        return {
            "memory": plan.memory,
            "planned": plan.planned_bytes,
            "weights": plan.weight_bytes,
            "cache": int(self._memory.cache.nbytes),
            "activations": plan.breakdown.activations,
        }

    def _turn(self) -> None:
        """Run the next request to its end."""
        with self._changed:
            self._running = self._queue.pop() if len(self._queue) else None
        answer = self._running
        if answer is not None:
            last = self._answer(answer)
            self._running = None
            answer.put(last)

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
                self._counted()
                answer.put(piece)
                if live.reason is None:
                    logits = self._step(answer, [token])
            return live.finished(live.reason or "cancelled")
        except Exception as error:
            self._memory.forget()
            return live.finished("error", failure(error))

    def _read(self, answer: Answer) -> Tensor | None:
        """Take the prompt in; the logits after it, None when cancelled."""
        live, request = answer.live, answer.live.request
        self._check(request)
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
            scores += live.scores(len(scores), after)
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
