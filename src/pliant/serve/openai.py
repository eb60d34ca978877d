"""OpenAI's completion requests: their fields, and what they ask of an engine.

Fields that OpenAI does not have: top_k, min_p, top_h, priority, guided_regex and guided_choice.
Unknown fields are ignored, as OpenAI's clients expect; known ones that would change the answer and
cannot be followed are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pliant.run.generate import encode
from pliant.run.sampling import Sampler
from pliant.serve.api_error import ApiError
from pliant.serve.engine import Engine
from pliant.serve.formats import Format
from pliant.serve.grammar import Grammar, Grammars
from pliant.serve.request import Request

MOST_PROMPTS = 128
MOST_ANSWERS = 16  # to a prompt
DEFAULT_MAX_TOKENS = 16  # of /v1/completions, as OpenAI's

_INT64 = 2**63
_Count = Annotated[int, Field(ge=0, lt=_INT64)]
_Penalty = Annotated[float, Field(ge=-2, le=2)]
_Bias = Annotated[float, Field(ge=-100, le=100)]
_Tokens = Annotated[list[_Count], Field(min_length=1)]
_Stop = str | Annotated[list[str], Field(max_length=16)] | None
_Prompts = Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS)]
_TokenPrompts = Annotated[list[_Tokens], Field(min_length=1, max_length=MOST_PROMPTS)]


class StreamOptions(BaseModel):
    include_usage: bool | None = None


class Common(Format):
    """What both kinds of completion take. model: None for the one that is served."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=_INT64)
    min_p: float | None = Field(None, ge=0, le=1)
    top_h: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-_INT64, lt=_INT64)
    stop: _Stop = None
    n: int | None = Field(None, ge=1, le=MOST_ANSWERS)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: int | None = Field(None, ge=-(2**31), lt=2**31)
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    logit_bias: dict[_Count, _Bias] | None = None

    def sampler(self) -> Sampler:
        temperature = 1.0 if self.temperature is None else self.temperature
        top_k = max(self.top_k or 0, 0)
        return Sampler(
            temperature,
            self.top_p or 1.0,
            self.seed,
            top_k,
            self.min_p or 0.0,
            self.top_h or 1.0,
            self.presence_penalty or 0.0,
            self.frequency_penalty or 0.0,
            tuple((self.logit_bias or {}).items()),
        )

    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def wants_usage(self) -> bool:
        """Whether the end of a stream tells how many tokens there were."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def check(self) -> None:
        """Raise ApiError for what is asked for and is not there."""
        for name in self.refused():
            if getattr(self, name):
                raise ApiError(
                    f"{name} is not supported; leave it out", param=name,
                    code="unsupported_parameter",
                )  # fmt: skip

    def refused(self) -> tuple[str, ...]:
        """Fields that must be empty."""
        return ()


class CompletionRequest(Common):
    """POST /v1/completions."""

    prompt: str | _Tokens | _Prompts | _TokenPrompts
    max_tokens: _Count | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None
    best_of: int | None = Field(None, ge=1)
    suffix: str | None = None

    def refused(self) -> tuple[str, ...]:
        return ("suffix",)

    def check(self) -> None:
        super().check()
        if self.best_of not in (None, self.n or 1):
            raise ApiError(
                f"best_of must be n, which is {self.n or 1}", param="best_of",
                code="unsupported_parameter",
            )  # fmt: skip


class Part(BaseModel):
    """A part of a message; only those of type "text" are understood."""

    type: str
    text: str | None = None


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, list):
            other = next((part.type for part in self.content if part.type != "text"), None)
            if other is not None:
                raise ApiError(f"content of type {other!r} is not supported", param="messages")
            content = "".join(part.text or "" for part in self.content)
        else:
            content = self.content or ""
        return {"role": role, "content": content}


class ChatRequest(Common):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, lt=_INT64)
    max_completion_tokens: int | None = Field(None, ge=1, lt=_INT64)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Any] | None = None
    functions: list[Any] | None = None

    def refused(self) -> tuple[str, ...]:
        return ("tools", "functions")


def completions(
    body: CompletionRequest, engine: Engine, grammars: Grammars
) -> list[tuple[Request, str]]:
    """n requests for each prompt, and the text of the prompt where the answer begins with it."""
    body.check()
    prompts: Sequence[Any]
    if isinstance(body.prompt, str) or isinstance(body.prompt[0], int):
        prompts = [body.prompt]
    else:
        prompts = body.prompt
    if len(prompts) * (body.n or 1) > MOST_PROMPTS:
        raise ApiError(f"prompts times n must be at most {MOST_PROMPTS}", param="n")
    wanted = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    grammar, made = body.grammar(grammars), []
    for prompt in prompts:
        tokens = _tokens(engine, prompt, raw=True, param="prompt")
        asked = _requests(body, engine, tokens, wanted, grammar, body.logprobs, bool(body.echo))
        echo = _text(engine, prompt) if body.echo else ""
        made += [(request, echo) for request in asked]
    return made


def chat(body: ChatRequest, engine: Engine, grammars: Grammars) -> list[Request]:
    """n requests for answers to a conversation; as long as the context allows by default."""
    body.check()
    if body.top_logprobs and not body.logprobs:
        raise ApiError("top_logprobs needs logprobs to be true", param="top_logprobs")
    if not getattr(engine.tokenizer, "chat_template", None):
        raise ApiError("this model has no chat template; use /v1/completions", param="messages")
    messages = [message.plain() for message in body.messages]
    _check_text("".join(message["content"] for message in messages), "messages")
    tokens = _tokens(engine, messages, raw=False, param="messages")
    wanted = body.max_completion_tokens or body.max_tokens or engine.context
    told = body.top_logprobs or 0 if body.logprobs else None
    return _requests(body, engine, tokens, wanted, body.grammar(grammars), told)


def _requests(
    body: Common,
    engine: Engine,
    tokens: list[int],
    wanted: int,
    grammar: Grammar | None,
    logprobs: int | None,
    echo: bool = False,
) -> list[Request]:
    """n requests that differ in their seeds."""
    outside = [token for token in body.logit_bias or () if token >= engine.vocabulary]
    if outside:
        words = f"token {outside[0]} is not in the vocabulary of {engine.vocabulary}"
        raise ApiError(words, param="logit_bias")
    request = Request(
        prompt=tuple(tokens),
        max_tokens=min(wanted, engine.context),
        sampler=body.sampler(),
        stop=body.stops(),
        logprobs=logprobs,
        score_prompt=echo and logprobs is not None,
        priority=body.priority or 0,
        grammar=grammar,
    )
    sampler, seed = request.sampler, body.seed
    if seed is None:
        return [request] * (body.n or 1)
    return [replace(request, sampler=replace(sampler, seed=seed + i)) for i in range(body.n or 1)]


def _tokens(engine: Engine, prompt: Any, raw: bool, param: str) -> list[int]:
    """Token ids of a prompt, which fit the vocabulary and the context."""
    if isinstance(prompt, str):
        _check_text(prompt, param)
    try:
        tokens = encode(engine.tokenizer, prompt, raw)
    except Exception as error:  # templates are the model's code, and raise what they like
        raise ApiError(f"the {param} cannot be encoded: {error}", param=param) from None
    if not tokens:
        raise ApiError("the prompt is empty; give at least one token of text", param=param)
    if max(tokens) >= engine.vocabulary:
        raise ApiError(
            f"token {max(tokens)} is not in the vocabulary of {engine.vocabulary}", param=param
        )
    if len(tokens) > engine.context:
        raise ApiError(
            f"the prompt has {len(tokens)} tokens and the context is {engine.context}; shorten it, "
            "or start the server with a longer --context",
            param=param,
            code="context_length_exceeded",
        )
    return tokens


def _check_text(text: str, param: str) -> None:
    """JSON can spell half of a surrogate pair, which no encoding of text knows."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ApiError(f"the {param} holds what is no text: {error}", param=param) from None


def _text(engine: Engine, prompt: str | list[int]) -> str:
    if isinstance(prompt, str):
        return prompt
    return str(engine.tokenizer.decode(prompt, clean_up_tokenization_spaces=False))
