"""Answers that keep to a grammar: JSON of a schema, a regular expression, one of some texts.

llguidance compiles a grammar and tells, token by token, what may come next. It is in the extra
`serve`; without it everything else works.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pliant.errors import PliantError

MOST_CHARACTERS = 1 << 18  # of a grammar's text
KEPT = 32  # compiled grammars that wait for the same request again
# Work that a grammar may cost, in llguidance's units: about 20 ms to begin with and 20 ms a token.
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 20_000,  # of 1 to 2 kB
    "max_grammar_size": 100_000,
    "verbose_errors": False,  # they would repeat the grammar
}
# One blank, or a line break and an indent: else a model at a loss fills the answer with blanks.
WHITESPACE = r"[ \t]|\r?\n[ \t]{0,40}"


class GrammarError(PliantError):
    """A grammar that cannot be followed; the message says why."""


class Grammar:
    """A compiled grammar, for any number of answers."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def start(self) -> Course:
        """The state of a new answer."""
        return Course(self._matcher.deep_copy())


class Course:
    """Where one answer is in its grammar."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    @property
    def over(self) -> bool:
        """Whether nothing but the end may follow."""
        return bool(self._matcher.is_stopped())

    def mask(self, logits: Tensor) -> Tensor:
        """`logits` [vocabulary] on the CPU, minus infinity where the grammar allows no token.

        Tokens that end an answer are allowed where the grammar may stop. In numpy: torch's threads
        would get in the way of those that compute the model, and halve its speed.
        """
        allowed = np.frombuffer(self._matcher.compute_logit_bias(), dtype=np.uint8)
        self._check()
        masked = np.full(len(logits), -np.inf, dtype=np.float32)
        both = min(len(allowed), len(logits))  # a model can have more entries than its tokenizer
        found = logits[:both].float().cpu().numpy()
        np.copyto(masked[:both], found, where=allowed[:both] != 0)
        return torch.from_numpy(masked)

    def commit(self, token: int) -> None:
        """`token` was chosen."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(f"the grammar cannot be followed: {_words(self._matcher)}")


class Grammars:
    """Compiles grammars for one tokenizer, and keeps those of late. For one thread.

    end: tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, end: frozenset[int]) -> None:
        self._plain, self._end = tokenizer, end
        self._compiled = lru_cache(KEPT)(self._compile)

    def json(self, schema: Any) -> Grammar:
        """JSON that `schema` (a JSON schema) allows, on one line or indented."""
        try:
            text = json.dumps(schema)
        except (RecursionError, ValueError) as error:
            raise GrammarError(f"the schema cannot be read: {error}") from None
        return self._compiled("json", text)

    def regex(self, pattern: str) -> Grammar:
        """Text that `pattern`, in the syntax of Rust's regex crate, matches as a whole."""
        return self._compiled("regex", pattern)

    def choice(self, texts: Sequence[str]) -> Grammar:
        """One of `texts`."""
        return self._compiled("lark", "start: " + " | ".join(json.dumps(text) for text in texts))

    def _compile(self, kind: str, text: str) -> Grammar:
        if len(text) > MOST_CHARACTERS:
            raise GrammarError(f"it has {len(text)} characters, and {MOST_CHARACTERS} are allowed")
        tokenizer = self._tokenizer
        from llguidance import LLMatcher, LLParserLimits

        try:
            if kind == "json":
                grammar = LLMatcher.grammar_from_json_schema(
                    text, defaults={"whitespace_pattern": WHITESPACE}
                )
            elif kind == "regex":
                grammar = LLMatcher.grammar_from_regex(text)
            else:
                grammar = LLMatcher.grammar_from_lark(text)
            limits = LLParserLimits(**LIMITS)
            matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
        except ValueError as error:
            raise GrammarError(str(error)) from None
        if matcher.is_error():
            raise GrammarError(_words(matcher))
        return Grammar(matcher)

    @cached_property
    def _tokenizer(self) -> Any:
        """llguidance's form of the tokenizer; half a second of work."""
        try:
            from llguidance.hf import from_tokenizer
        except ImportError:
            raise GrammarError(
                "grammars need the package llguidance; start the server where it is installed: "
                "pip install 'pliant[serve]'"
            ) from None
        if not getattr(self._plain, "is_fast", False):
            raise GrammarError("grammars need a fast tokenizer, and this model has none")
        ends = sorted(token for token in self._end if token < len(self._plain))
        try:
            return from_tokenizer(self._plain, eos_token=ends)
        except ValueError as error:
            raise GrammarError(f"grammars cannot use this model's tokenizer: {error}") from None


def _words(matcher: Any) -> str:
    """What is wrong, in a line."""
    return " ".join(matcher.get_error().replace("<non-verbose/>", "").split())[:400]
