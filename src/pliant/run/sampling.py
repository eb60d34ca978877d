"""The next token from its logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pliant.errors import PliantError


@dataclass(frozen=True)
class Sampler:
    """Greedy at temperature 0; else a draw from the tokens that every filter leaves.

    Filters see the probabilities at `temperature`. top_k: the likeliest so many, 0 for all. top_p:
    the likeliest of this mass. min_p: those at least this times as likely as the likeliest.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    top_k: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise PliantError(f"temperature must be 0 or more, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise PliantError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.top_k < 0:
            raise PliantError(f"top_k must be 0 (all tokens) or more, not {self.top_k}")
        if not 0 <= self.min_p <= 1:
            raise PliantError(f"min_p must be from 0 to 1, not {self.min_p}")

    def generator(self) -> torch.Generator:
        """Random numbers of one answer; the same seed gives the same answer."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator

    def choose(
        self,
        logits: Tensor,  # [vocabulary]
        generator: torch.Generator,
    ) -> int:
        if self.temperature == 0:
            return int(logits.argmax())
        logits = logits.double().cpu()
        probabilities = torch.softmax((logits - logits.max()) / self.temperature, dim=-1)
        if self.top_p < 1 or 0 < self.top_k < len(probabilities):
            ordered, order = probabilities.sort(descending=True, stable=True)
            mass = ordered.cumsum(0) - ordered  # of the tokens before each
            if self.top_k:
                ordered[self.top_k :] = 0
            if self.top_p < 1:
                ordered[mass >= self.top_p] = 0
            probabilities = torch.zeros_like(probabilities).scatter(0, order, ordered)
        if self.min_p:
            probabilities[probabilities < self.min_p * probabilities.max()] = 0
        return int(torch.multinomial(probabilities, 1, generator=generator))


@dataclass(frozen=True)
class Score:
    """A token and its log probability, nats, as the model has it: before temperature and filters.

    likeliest: the tokens that the model would rather have had, best first, with theirs.
    """

    token: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...] = ()

    @staticmethod
    def of(logits: Tensor, token: int, count: int) -> Score:
        """Score `token` by `logits` [vocabulary], beside the `count` likeliest."""
        logprobs = torch.log_softmax(logits.float(), dim=-1)
        best = logprobs.topk(min(count, len(logprobs)))
        likeliest = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return Score(token, float(logprobs[token]), likeliest)
