"""A request, what becomes of it while it runs, and the events that it gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from pliant.errors import PliantError
from pliant.run.sampling import Sampler, Score
from pliant.run.text import TextStream
from pliant.serve.grammar import Grammar

Reason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Request:
    """One prompt to continue.

    prompt: token ids, at least one. max_tokens: the longest answer; 0 reads the prompt alone.
    stop: the answer ends before the first of these texts. logprobs: how many likeliest tokens to
    tell beside each token, None to tell nothing. score_prompt: tell the same of the prompt's
    tokens. priority: lower is served first; arrival decides between equals. grammar: what the
    answer must be.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    sampler: Sampler = field(default_factory=Sampler)
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    score_prompt: bool = False
    priority: int = 0
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        if not self.prompt:
            raise PliantError("the prompt is empty; give at least one token of text")
        if self.max_tokens < 0:
            raise PliantError(f"max_tokens must be 0 or more, not {self.max_tokens}")
        if self.logprobs is not None and self.logprobs < 0:
            raise PliantError(f"logprobs must be 0 or more, not {self.logprobs}")


@dataclass(frozen=True)
class Token:
    """A token of the prompt or the answer.

    offset: characters of the prompt's or the answer's text before it. Where the request asks for
    logprobs, also its own text, its logprob (nats), and texts and logprobs of the likeliest tokens,
    best first; the first token of a prompt has its text alone.
    """

    id: int
    text: str
    offset: int
    logprob: float | None = None
    likeliest: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Prompt:
    """The scored tokens of the prompt, before everything else."""

    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class Piece:
    """More of the answer: text that no stop string can take back, and the tokens that it ends.

    A token is held back as long as a part of its text. Text can be empty, for tokens that have
    none; tokens can be empty, for text that ends inside one.
    """

    text: str
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True)
class Finished:
    """The last event. Tokens are counts; `message` says what went wrong after an error.

    resized: weights or pages that the answer comes of changed their size on the way. reason: "stop"
    (end of text or a stop string), "length" (max_tokens, or the context is full),
    "cancelled" or "error".
    """

    reason: Reason
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    message: str = ""
    resized: bool = False


Event = Prompt | Piece | Finished


class Live:
    """What an engine knows of a request that it runs; turns its tokens into events.

    end: tokens that end an answer. cached: prompt tokens that need not be computed. made: tokens
    so far. reason: why it is over, None before.
    """

    def __init__(self, request: Request, tokenizer: Any, end: frozenset[int]) -> None:
        self.request, self._tokenizer, self._end = request, tokenizer, end
        self.generator = request.sampler.generator()
        self.cached, self.made = 0, 0
        self.resized = False
        self.reason: Reason | None = None
        self._said = Counter[int]()  # tokens of the answer
        self._course = request.grammar.start() if request.grammar else None
        self._text = TextStream(tokenizer, request.stop)
        self._given = self._seen = 0  # characters given out, and those held back besides
        self._waiting: list[tuple[Score, int]] = []  # tokens whose text is not out, their offsets
        self._ends: list[int] = []  # where the text of the first of them ends, as far as known

    def next(self, logits: Tensor, room: bool = True) -> tuple[int, Piece]:
        """Choose the token after `logits` [vocabulary]; the id, and what it gives out.

        room: whether the context takes another one behind it.
        """
        request = self.request
        allowed = self._course.mask(logits) if self._course else logits
        token = request.sampler.choose(allowed, self.generator, self._said)
        counted = request.logprobs is not None
        score = Score.of(logits, token, request.logprobs or 0) if counted else Score(token, 0.0)
        return token, self.push(score, room)

    def push(self, score: Score, room: bool = True) -> Piece:
        """The next token is this one: what it gives out."""
        self.made += 1
        if score.token in self._end:
            return self._last("stop", score)
        self._said[score.token] += 1
        if self._course:
            self._course.commit(score.token)
        self._waiting.append((score, self._seen))
        text = self._text.push(score.token)
        if self._text.stopped or (self._course and self._course.over):
            return self._last("stop", said=text)
        if self.made >= self.request.max_tokens or not room:
            return self._last("length", said=text)
        return self._give(text)

    def finished(self, reason: Reason, message: str = "") -> Finished:
        """The last event."""
        self.reason = reason
        counts = len(self.request.prompt), self.cached, self.made
        return Finished(reason, *counts, message, self.resized)

    def scores(self, done: int, logits: Tensor) -> list[Score]:
        """Of the prompt's tokens behind `done` scored ones; logits [n, vocabulary] before each."""
        following, likeliest = self.request.prompt[done + 1 :], self.request.logprobs or 0
        return [
            Score.of(row, token, likeliest) for row, token in zip(logits, following, strict=False)
        ]

    def prompt(self, scores: Sequence[Score]) -> Prompt:
        """The prompt's tokens; scores: of all but the first."""
        tokens = [Token(self.request.prompt[0], self._alone(self.request.prompt[0]), 0)]
        for score in scores:
            tokens.append(self._token(score, tokens[-1].offset + len(tokens[-1].text)))
        return Prompt(tuple(tokens))

    def _last(self, reason: Reason, end: Score | None = None, said: str = "") -> Piece:
        """The rest of the answer, with the token that ended it where one did."""
        self.reason = reason
        piece = self._give(said)
        if not self._text.stopped:
            rest = self._give(self._text.finish())
            piece = Piece(piece.text + rest.text, piece.tokens + rest.tokens)
            if self._text.stopped:  # the last characters were a stop string
                self.reason = "stop"
        if end is None:
            return piece
        return Piece(piece.text, (*piece.tokens, self._token(end, self._given)))

    def _give(self, text: str) -> Piece:
        self._given += len(text)
        self._seen = self._given + self._text.held
        if self._text.whole and not self._text.stopped:
            self._ends += [self._seen] * (len(self._waiting) - len(self._ends))
        out = [token for token, end in zip(self._waiting, self._ends, strict=False)
               if end <= self._given]  # fmt: skip
        del self._waiting[: len(out)], self._ends[: len(out)]
        return Piece(text, tuple(self._token(score, at) for score, at in out))

    def _token(self, score: Score, offset: int) -> Token:
        if self.request.logprobs is None:
            return Token(score.token, "", offset)
        likeliest = tuple((self._alone(token), logprob) for token, logprob in score.likeliest)
        return Token(score.token, self._alone(score.token), offset, score.logprob, likeliest)

    def _alone(self, token: int) -> str:
        """A token's own text; special tokens are shown."""
        return str(
            self._tokenizer.decode(
                [token], skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )
