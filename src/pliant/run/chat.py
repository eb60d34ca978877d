"""A conversation that stays inside the context: the oldest turns go first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pliant.errors import PliantError
from pliant.run.generate import Memory, Usage, encode, stream

Message = dict[str, str]


class Chat:
    """Keeps the history, and the keys and values of what both sides said so far.

    history: turns without the system message. max_new_tokens: room kept for an answer.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        system: str | None = None,
        context: int | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        top_h: float = 1.0,
        stop: tuple[str, ...] = (),
    ) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise PliantError("this model's tokenizer has no chat template; use plain completion")
        self.model, self.tokenizer = model, tokenizer
        self.history: list[Message] = []
        self.system = system
        self.memory = Memory(model, context)
        self.max_new_tokens = min(max_new_tokens, max(self.memory.context // 2, 1))
        self.options = {"temperature": temperature, "top_p": top_p, "seed": seed, "top_h": top_h,
                        "stop": stop}  # fmt: skip
        self.usage = Usage()

    def send(self, text: str) -> Iterator[str]:
        """Pieces of the answer to `text`; both join the history when it ends or is broken off."""
        self.history.append({"role": "user", "content": text})
        try:
            tokens = self._trimmed()
        except PliantError:
            self.history.pop()
            raise
        self.usage = Usage()
        pieces = stream(
            self.model,
            self.tokenizer,
            tokens,
            max_new_tokens=self.max_new_tokens,
            memory=self.memory,
            usage=self.usage,
            **self.options,  # type: ignore[arg-type]
        )
        return self._answer(pieces)

    def clear(self) -> None:
        """Forget the conversation."""
        self.history.clear()

    def _answer(self, pieces: Iterator[str]) -> Iterator[str]:
        said: list[str] = []
        try:
            for piece in pieces:
                said.append(piece)
                yield piece
        finally:
            self.history.append({"role": "assistant", "content": "".join(said)})

    def _trimmed(self) -> list[int]:
        """Tokens of the newest turns that leave room for an answer; drops the others."""
        while True:
            tokens = self._encode()
            if len(tokens) + self.max_new_tokens <= self.memory.context:
                return tokens
            if len(self.history) == 1:
                room = self.memory.context - self.max_new_tokens
                raise PliantError(
                    f"the message has {len(tokens)} tokens and only {room} fit in the context "
                    "beside an answer; shorten it, or open the model with a longer context"
                )
            del self.history[:2]

    def _encode(self) -> list[int]:
        first = [{"role": "system", "content": self.system}] if self.system else []
        return encode(self.tokenizer, [*first, *self.history])
