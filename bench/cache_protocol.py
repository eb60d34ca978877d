"""What bench/cache.py and the script of its peers share; it imports torch alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

WINDOW, PROMPT = 2048, 1536
CHUNK, STEP = 256, 32
"""Tokens at once in the prompt that is read in parts, and in the part that is scored."""

PROTOCOLS = {
    "parts": f"The prompt is read {CHUNK} tokens at a time and the cache comes down after each.",
    "whole": "The prompt is read at once with full attention and the cache comes down after it.",
}


def scored(window: Tensor) -> list[Tensor]:
    """What follows the prompt of `window` [WINDOW], STEP tokens at a time."""
    return list(window[PROMPT:].split(STEP))


@torch.no_grad()
def compared(original: Tensor, other: Tensor) -> tuple[float, int]:
    """Sum of KL over rows of logits [n, vocabulary], and how many most likely tokens agree."""
    p, q = original.float().log_softmax(-1), other.float().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1, dtype=torch.float64).sum()
    return float(kl), int((p.argmax(-1) == q.argmax(-1)).sum())


class Score:
    """Damage of one window, added up over steps. hidden [WINDOW - PROMPT, d]: the original's."""

    def __init__(self, head: Any, hidden: Tensor) -> None:
        self._head, self._hidden = head, hidden
        self._kl, self._same, self._done = 0.0, 0, 0

    @torch.no_grad()
    def add(self, logits: Tensor) -> None:
        """logits [n, vocabulary] of the next n positions."""
        original = self._head(self._hidden[self._done : self._done + len(logits)])
        kl, same = compared(original, logits)
        self._kl, self._same, self._done = (
            self._kl + kl,
            self._same + same,
            self._done + len(logits),
        )

    def result(self) -> dict[str, float]:
        """kl: mean, nats a token. same: share of tokens."""
        return {"kl": self._kl / self._done, "same": self._same / self._done}
