"""Text out of tokens as they come: whole characters only, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class TextStream:
    """Turns tokens into pieces of text that together are the decoded answer.

    A piece is held back while it could be a part of a character, or the start of a stop string.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = [text for text in stop if text]
        self._tokens: list[int] = []
        self._context = self._read = 0  # tokens[context:read] were given out, and set the spacing
        self._held = ""
        self.stopped = False

    @property
    def held(self) -> int:
        """Characters that are held back because a stop string may begin with them."""
        return len(self._held)

    @property
    def whole(self) -> bool:
        """Whether all tokens are text by now: none waits for the rest of a character."""
        return self._read == len(self._tokens)

    def push(self, token: int) -> str:
        """The text that `token` completes, possibly none."""
        self._tokens.append(token)
        text = self._decode(self._context)
        before = self._decode(self._context, self._read)
        if text.endswith("\ufffd") or len(text) <= len(before):
            return ""
        self._context, self._read = self._read, len(self._tokens)
        return self._give(text[len(before) :])

    def finish(self) -> str:
        """What is left when no token follows."""
        if self.stopped:
            return ""
        rest = self._decode(self._context)[len(self._decode(self._context, self._read)) :]
        self._read = len(self._tokens)
        text = self._give(rest)
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _decode(self, start: int, stop: int | None = None) -> str:
        return str(
            self._tokenizer.decode(
                self._tokens[start:stop],
                skip_special_tokens=True,
                clean_up_tokenization_spaces=False,
            )
        )

    def _give(self, text: str) -> str:
        text = self._held + text
        found = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
