"""The next token from its logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pliant.errors import PliantError


@dataclass(frozen=True)
class Sampler:
    """Greedy at temperature 0; else a draw from the most likely tokens of mass `top_p`."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise PliantError(f"temperature must be 0 or more, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise PliantError(f"top_p must be above 0 and at most 1, not {self.top_p}")

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
        probabilities = torch.softmax(logits.double().cpu() / self.temperature, dim=-1)
        if self.top_p < 1:
            ordered, order = probabilities.sort(descending=True, stable=True)
            ordered[ordered.cumsum(0) - ordered >= self.top_p] = 0
            probabilities = torch.zeros_like(probabilities).scatter(0, order, ordered)
        return int(torch.multinomial(probabilities, 1, generator=generator))
