"""Answers as server-sent events: a chunk for each piece, as OpenAI's API streams them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from pliant.serve.api_error import ApiError
from pliant.serve.engine import Answer
from pliant.serve.replies import (
    ChatChunk,
    Completion,
    Delta,
    DeltaChoice,
    TextChoice,
    Usage,
    chat_logprobs,
    ended,
    header,
    text_logprobs,
)
from pliant.serve.request import Event, Finished, Piece, Prompt, Token

Events = AsyncIterator[Event]


class EventStream(StreamingResponse):
    """Sends chunks as they come; when it ends, in whatever way, `answers` are cancelled."""

    def __init__(self, chunks: AsyncIterator[str], answers: Sequence[Answer]) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(_events(chunks), media_type="text/event-stream", headers=headers)
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for answer in self._answers:
                answer.cancel()


async def text_chunks(
    answers: Sequence[Events],
    echoes: Sequence[str],
    model: str,
    logprobs: bool,
    usage: bool,
    each: int = 1,
) -> AsyncIterator[str]:
    """Chunks of /v1/completions: one answer after the other; they are made side by side.

    echoes: texts that the answers begin with, empty for none. each: answers to a prompt.
    """
    head = header("cmpl", model)
    ends: list[Finished] = []

    def chunk(choice: TextChoice) -> str:
        return _dump(Completion(**head, choices=[choice]), usage)

    def choice(index: int, text: str, prompt: Sequence[Token], tokens: Sequence[Token]) -> str:
        told = text_logprobs(prompt, tokens, len(echoes[index])) if logprobs else None
        return chunk(TextChoice(index=index, text=text, logprobs=told))

    for index, (answer, echo) in enumerate(zip(answers, echoes, strict=True)):
        if echo and not logprobs:
            yield choice(index, echo, (), ())
        async for event in answer:
            match event:
                case Prompt():
                    yield choice(index, echo, event.tokens, ())
                case Piece() if event.text or (logprobs and event.tokens):
                    yield choice(index, event.text, (), event.tokens)
                case Finished():
                    ends.append(ended(event))
                    yield chunk(TextChoice(index=index, text="", finish_reason=event.reason))
    if usage:
        yield Completion(**head, choices=[], usage=Usage.of(ends, each)).model_dump_json()


async def chat_chunks(
    answers: Sequence[Events], model: str, logprobs: bool, usage: bool
) -> AsyncIterator[str]:
    """Chunks of /v1/chat/completions: of each answer the role, the pieces, why it ends."""
    head = header("chatcmpl", model)
    ends: list[Finished] = []

    def chunk(
        index: int, delta: Delta, tokens: Sequence[Token] = (), reason: str | None = None
    ) -> str:
        told = chat_logprobs(tokens) if logprobs and tokens else None
        choice = DeltaChoice(index=index, delta=delta, logprobs=told, finish_reason=reason)
        return _dump(ChatChunk(**head, choices=[choice]), usage)

    for index, answer in enumerate(answers):
        yield chunk(index, Delta(role="assistant", content=""))
        async for event in answer:
            match event:
                case Piece() if event.text or (logprobs and event.tokens):
                    yield chunk(index, Delta(content=event.text), event.tokens)
                case Finished():
                    ends.append(ended(event))
                    yield chunk(index, Delta(), reason=event.reason)
    if usage:
        last = ChatChunk(**head, choices=[], usage=Usage.of(ends, len(answers)))
        yield last.model_dump_json()


def _dump(chunk: Completion | ChatChunk, usage: bool) -> str:
    """Without the `usage` field, unless the stream will tell it; a delta has what changes."""
    made = chunk.model_dump(exclude=None if usage else {"usage"})
    for choice in made["choices"]:
        if "delta" in choice:
            choice["delta"] = {k: v for k, v in choice["delta"].items() if v is not None}
    return json.dumps(made, ensure_ascii=False, separators=(",", ":"))


async def _events(chunks: AsyncIterator[str]) -> AsyncIterator[str]:
    """The lines of each chunk; a failure is an error object in their place."""
    try:
        async with aclosing(chunks):  # type: ignore[type-var]
            async for chunk in chunks:
                yield f"data: {chunk}\n\n"
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield f"data: {json.dumps(error.body())}\n\n"
