"""An engine that says what it is told to, byte by byte, and writes down what happens to it."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from pliant.errors import BudgetError
from pliant.run.sampling import Score
from pliant.serve.engine import Answer, ClosedError, QueueFullError, Status
from pliant.serve.request import Live, Request

from ..run.tiny import ChatTokenizer

END = 2
TEXT = "Hello, wörld.\nBye."


class ScriptedEngine:
    """Answers every prompt with `text`. While `held`, answers stop after their first token."""

    context = 4096
    vocabulary = 260
    end = frozenset({END})

    def __init__(self) -> None:
        self.tokenizer = ChatTokenizer()
        self.reset()

    def reset(self) -> None:
        self.text, self.held, self.error, self.most = TEXT, False, "", 1000
        self.requests: list[Request] = []
        self.cancelled: list[Request] = []
        self.closed = False
        self._tasks: dict[Answer, asyncio.Task] = {}
        self._status = Status(0, 0, 100, 80, 50, 30, 0, 0, 0.0)

    def submit(self, request: Request) -> Answer:
        if self.closed:
            raise ClosedError("the server is shutting down")
        if len(self._tasks) >= self.most:
            raise QueueFullError("too many")
        answer = Answer(Live(request, self.tokenizer, self.end), self._cancel)
        self.requests.append(request)
        self._tasks[answer] = asyncio.get_running_loop().create_task(self._run(answer))
        return answer

    def status(self) -> Status:
        return replace(self._status, running=len(self._tasks))

    async def set_budget(self, memory: int) -> Status:
        if memory < 10:
            raise BudgetError("the smallest total is 10 bytes")
        self._status = replace(self._status, memory=memory)
        return self.status()

    async def close(self) -> None:
        self.closed = True
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _cancel(self, answer: Answer) -> None:
        task = self._tasks.pop(answer, None)
        if task:
            task.cancel()
            self.cancelled.append(answer.live.request)
            answer.put(answer.live.finished("cancelled"))

    async def _run(self, answer: Answer) -> None:
        live, request = answer.live, answer.live.request
        count = request.logprobs or 0
        if request.score_prompt:
            answer.put(live.prompt([_score(token, count) for token in request.prompt[1:]]))
        for token in [*self.tokenizer.tokens(self.text), END]:
            if live.reason or self.error or not request.max_tokens:
                break
            answer.put(live.push(_score(token, count)))
            await asyncio.sleep(0)
            while self.held:
                await asyncio.sleep(0.002)
        self._tasks.pop(answer, None)
        answer.put(live.finished("error" if self.error else live.reason or "length", self.error))


def _score(token: int, count: int) -> Score:
    """The token itself is the likeliest, the next one the second."""
    return Score(token, -0.5, ((token, -0.5), ((token + 1) % 260, -1.5))[:count])
