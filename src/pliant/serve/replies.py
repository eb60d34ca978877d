"""OpenAI's completion objects, made of an engine's events."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from pliant.serve.api_error import ApiError
from pliant.serve.request import Event, Finished, Piece, Prompt, Token

_LEAST_LOGPROB = -9999.0  # JSON has no infinity


class PromptDetails(BaseModel):
    cached_tokens: int = 0


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails

    @staticmethod
    def of(ends: Sequence[Finished], each: int = 1) -> Usage:
        """All prompts and answers of one HTTP request together; each prompt has `each` answers."""
        prompt = sum(end.prompt_tokens for end in ends[::each])
        new = sum(end.new_tokens for end in ends)
        details = PromptDetails(cached_tokens=sum(end.cached_tokens for end in ends[::each]))
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=new,
            total_tokens=prompt + new,
            prompt_tokens_details=details,
        )


class TextLogprobs(BaseModel):
    """Of /v1/completions: lists with an entry for each token."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: str | None = None


class Completion(BaseModel):
    """An answer of /v1/completions, or a part of one in a stream."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None


class Likely(BaseModel):
    """bytes: UTF-8 of the token; None where it is a part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatToken(Likely):
    top_logprobs: list[Likely]


class ChatLogprobs(BaseModel):
    content: list[ChatToken]


class ChatMessage(BaseModel):
    role: str = "assistant"
    content: str


class ChatChoice(BaseModel):
    index: int = 0
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class ChatCompletion(BaseModel):
    """An answer of /v1/chat/completions."""

    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    role: str | None = None
    content: str | None = None


class DeltaChoice(BaseModel):
    index: int = 0
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class ChatChunk(BaseModel):
    """A part of an answer of /v1/chat/completions in a stream."""

    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    choices: list[DeltaChoice]
    usage: Usage | None = None


@dataclass
class Said:
    """Everything that came of one request."""

    end: Finished
    text: str = ""
    prompt: list[Token] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)


async def collect(answer: AsyncIterator[Event]) -> Said:
    """Wait for a whole answer. Raises ApiError when it ends in an error."""
    said = Said(Finished("error"))
    pieces: list[str] = []
    async for event in answer:
        match event:
            case Prompt():
                said.prompt += event.tokens
            case Piece():
                pieces.append(event.text)
                said.tokens += event.tokens
            case Finished():
                said.end = ended(event)
    said.text = "".join(pieces)
    return said


def ended(event: Finished) -> Finished:
    """`event`, unless it is a failure: that is raised as ApiError."""
    if event.reason == "error":
        raise ApiError(event.message, 500)
    if event.reason == "cancelled":
        raise ApiError("the request was cancelled", 503)
    return event


def text_logprobs(prompt: Sequence[Token], tokens: Sequence[Token], start: int) -> TextLogprobs:
    """start: characters of the prompt's text that the answer's text follows."""
    made = TextLogprobs()
    for token, offset in [(t, t.offset) for t in prompt] + [(t, start + t.offset) for t in tokens]:
        made.tokens.append(token.text)
        made.text_offset.append(offset)
        made.token_logprobs.append(None if token.logprob is None else _finite(token.logprob))
        made.top_logprobs.append(None if token.logprob is None else _likeliest(token))
    return made


def chat_logprobs(tokens: Sequence[Token]) -> ChatLogprobs:
    return ChatLogprobs(
        content=[
            ChatToken(
                **_likely(token.text, token.logprob or 0.0),
                top_logprobs=[Likely(**_likely(*likely)) for likely in token.likeliest],
            )
            for token in tokens
        ]
    )


def header(kind: str, model: str) -> dict[str, Any]:
    """Fields that begin every object of one answer."""
    return {"id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}


def _likely(text: str, logprob: float) -> dict[str, Any]:
    whole = "\ufffd" not in text
    encoded = list(text.encode()) if whole else None
    return {"token": text, "logprob": _finite(logprob), "bytes": encoded}


def _likeliest(token: Token) -> dict[str, float]:
    """By text; of tokens that look alike the likeliest. The chosen one is always among them."""
    found: dict[str, float] = {}
    for text, logprob in (*token.likeliest, (token.text, token.logprob or 0.0)):
        found.setdefault(text, _finite(logprob))
    return found


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB)
