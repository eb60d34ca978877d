"""The next token from its logits.

Rows of logits are handled in numpy: torch would wake its threads for each step, and they get in the
way of those that compute the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import xlogy
from torch import Tensor

from pliant.errors import PliantError

_SORTED = 1024  # likeliest tokens that filters look at before they look at all
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
        values = _row(logits).astype(np.float64)
        if not np.isfinite(values.max()):
            raise PliantError("the model's logits are not numbers; no token can be drawn")
        scaled = torch.from_numpy((values - values.max()) / self.temperature)
        probabilities: NDArray[np.float64] = torch.softmax(scaled, dim=-1).numpy()
        if self.top_p < 1 or self.top_h < 1 or 0 < self.top_k < len(probabilities):
            probabilities = self._truncated(probabilities)
        if self.min_p:
            probabilities[probabilities < self.min_p * probabilities.max()] = 0
        return _draw(probabilities, generator)

    def _truncated(self, probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
        """0 in place of what top_k, top_p and top_h leave out."""
        order, kept = np.empty(0, dtype=np.intp), 0
        for count in (_SORTED, len(probabilities)):  # few are kept most of the time
            order = likeliest(probabilities, max(count, self.top_k))
            ordered = probabilities[order]
            kept = len(order)
            if self.top_k:
                kept = min(kept, self.top_k)
            if self.top_p < 1:  # of the mass before each
                kept = min(kept, int((ordered.cumsum() - ordered < self.top_p).sum()))
            if self.top_h < 1:
                kept = min(kept, bounded(ordered, self.top_h * entropy(probabilities)))
            if kept < len(order):
                break
        out = np.zeros_like(probabilities)
        out[order[:kept]] = probabilities[order[:kept]]
        return out

    def _changed(self, logits: Tensor, said: Mapping[int, int]) -> Tensor:
        """`logits` with bias and penalties; themselves where there are none."""
        changes = dict(self.logit_bias)
        if self.presence_penalty or self.frequency_penalty:
            for token, count in said.items():
                penalty = self.presence_penalty + count * self.frequency_penalty
                changes[token] = changes.get(token, 0.0) - penalty
        if not changes:
            return logits
        changed = _row(logits).copy()
        changed[list(changes)] += np.array(list(changes.values()), dtype=changed.dtype)
        return torch.from_numpy(changed)


def likeliest(probabilities: NDArray[np.float64], count: int) -> NDArray[np.intp]:
    """The `count` likeliest tokens, and those as likely as the last of them, best first."""
    found = np.arange(len(probabilities))
    if count < len(probabilities):
        least = np.partition(probabilities, -count)[-count]
        found = np.flatnonzero(probabilities >= least)
    return found[np.argsort(-probabilities[found], kind="stable")]


def entropy(probabilities: NDArray[np.float64]) -> float:
    """Nats, of `probabilities` brought to sum to one."""
    mass = probabilities.sum()
    return float(np.log(mass) - xlogy(probabilities, probabilities).sum() / mass)


def bounded(ordered: NDArray[np.float64], most: float) -> int:
    """How many of the likeliest tokens have at most `most` nats of entropy; at least one.

    ordered: probabilities, falling. The entropy of the first so many, brought to sum to one, never
    falls as more join, so the greedy choice ends at the first that is too many. Source: "Top-H
    Decoding: Adapting the Creativity and Coherence with Bounded Entropy in Text Generation".
    """
    mass = ordered.cumsum()
    entropies = np.log(mass) - xlogy(ordered, ordered).cumsum() / mass
    return max(int((entropies <= most).sum()), 1)


def _row(logits: Tensor) -> NDArray[Any]:
    """Logits in main memory, of 32 bits or as many as they have."""
    found: NDArray[Any] = (
        (logits if logits.dtype == torch.float64 else logits.float()).cpu().numpy()
    )
    return found


def _draw(probabilities: NDArray[np.float64], generator: torch.Generator) -> int:
    """What torch.multinomial draws, token for token, in one thread."""
    waits = torch.empty(len(probabilities), dtype=torch.float64).exponential_(generator=generator)
    return int((probabilities / waits.numpy()).argmax())


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
