"""The next token from its logits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from pliant.errors import PliantError

_NOTHING: Mapping[int, int] = MappingProxyType({})


@dataclass(frozen=True)
class Sampler:
    """Greedy at temperature 0; else a draw from the tokens that every filter leaves.

    Filters see the probabilities at `temperature`. top_k: the likeliest so many, 0 for all. top_p:
    the likeliest of this mass. min_p: those at least this times as likely as the likeliest. top_h:
    the likeliest whose entropy is at most this times that of all.

    Before everything else, logits change: by `logit_bias` (token, difference), and down for tokens
    that the answer has, by presence_penalty once and by frequency_penalty each time.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    top_k: int = 0
    min_p: float = 0.0
    top_h: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise PliantError(f"temperature must be 0 or more, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise PliantError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.top_k < 0:
            raise PliantError(f"top_k must be 0 (all tokens) or more, not {self.top_k}")
        if not 0 <= self.min_p <= 1:
            raise PliantError(f"min_p must be from 0 to 1, not {self.min_p}")
        if not 0 < self.top_h <= 1:
            raise PliantError(f"top_h must be above 0 and at most 1, not {self.top_h}")
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise PliantError(f"{name} must be a finite number, not {getattr(self, name)}")

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
        said: Mapping[int, int] = _NOTHING,  # tokens of the answer so far, and how often each
    ) -> int:
        logits = self._changed(logits, said)
        if self.temperature == 0:
            return int(logits.argmax())
        logits = logits.double().cpu()
        probabilities = torch.softmax((logits - logits.max()) / self.temperature, dim=-1)
        if self.top_p < 1 or self.top_h < 1 or 0 < self.top_k < len(probabilities):
            ordered, order = probabilities.sort(descending=True, stable=True)
            mass = ordered.cumsum(0) - ordered  # of the tokens before each
            if self.top_h < 1:
                ordered[bounded(ordered, self.top_h) :] = 0
            if self.top_k:
                ordered[self.top_k :] = 0
            if self.top_p < 1:
                ordered[mass >= self.top_p] = 0
            probabilities = torch.zeros_like(probabilities).scatter(0, order, ordered)
        if self.min_p:
            probabilities[probabilities < self.min_p * probabilities.max()] = 0
        return int(torch.multinomial(probabilities, 1, generator=generator))

    def _changed(self, logits: Tensor, said: Mapping[int, int]) -> Tensor:
        """`logits` with bias and penalties; themselves where there are none."""
        changes = dict(self.logit_bias)
        if self.presence_penalty or self.frequency_penalty:
            for token, count in said.items():
                penalty = self.presence_penalty + count * self.frequency_penalty
                changes[token] = changes.get(token, 0.0) - penalty
        if not changes:
            return logits
        places = torch.tensor(list(changes), device=logits.device)
        by = torch.tensor(list(changes.values()), dtype=torch.float32, device=logits.device)
        return logits.float().index_add(0, places, by)


def bounded(ordered: Tensor, share: float) -> int:
    """How many of the likeliest tokens have at most `share` of the entropy of all; at least one.

    ordered: probabilities [vocabulary], falling. The entropy of the first so many, brought to sum
    to one, never falls as more join, so the greedy choice ends at the first that is too many.
    Source: "Top-H Decoding: Adapting the Creativity and Coherence with Bounded Entropy in Text
    Generation".
    """
    mass = ordered.cumsum(0)
    entropy = mass.log() - torch.xlogy(ordered, ordered).cumsum(0) / mass
    return max(int((entropy <= share * entropy[-1]).sum()), 1)


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
