"""Damage: the mean KL divergence, in nats a token, of another model from the original.

Text is cut into non-overlapping windows. With score="half" the second half of each is scored, as
llama-perplexity does: of 512 positions those from 256 on that have a next token, 255. With
score="all" every position that has a next token is. The original's logits are exact in 32 bits:
its final hidden states are computed once and kept, and its head is applied again for each
comparison, through the same operations as the other model's, so that a model's divergence from
itself is exactly zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pliant.errors import PliantError
from pliant.measure.logits import Parts, call, device_of, rows_per_chunk, take_apart
from pliant.measure.store import load_reference, save_reference

Score = Literal["half", "all"]
Progress = Callable[[int, int], None]
RESAMPLES = 1000


@dataclass(frozen=True)
class Damage:
    """kl: nats a token. kl_ci95: of its mean, by resampling windows. top1: share of tokens where
    both models' most likely next token is the same. window_kl: each window's mean, for pairing.
    """

    kl: float
    kl_ci95: tuple[float, float]
    perplexity: float
    perplexity_original: float
    top1: float
    tokens: int
    window_kl: tuple[float, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, without the windows."""
        fields = asdict(self)
        del fields["window_kl"]
        return fields | {"kl_ci95": list(self.kl_ci95)}


@dataclass(frozen=True)
class Reference:
    """The original model's side of a measurement, made once and compared with many models.

    ids: windows [n, window]. hidden: the original's final hidden states at the scored positions
    [n, positions, hidden], and its head; or, for a model that cannot be taken apart, the model.
    """

    ids: Tensor
    score: Score
    hidden: Tensor | None
    original: Parts | Any

    @classmethod
    @torch.inference_mode()
    def of(
        cls,
        model: Any,
        windows: Tensor,
        score: Score = "half",
        *,
        key: str | None = None,
        progress: Progress | None = None,
    ) -> Reference:
        """Run `model` over windows [n, window] of token ids.

        key: what identifies the model's weights (a checkpoint's fingerprint); with it the hidden
        states are kept in the cache directory and read from there the next time.
        """
        positions = scored_positions(windows.shape[-1], score)
        device = device_of(model)
        parts = take_apart(model, windows[:1].to(device))
        if parts is None:
            return cls(windows, score, None, model)
        if key is not None:
            key = f"{key}|{getattr(model, 'dtype', None)}"
        known = None if key is None else load_reference(key, windows, score)
        if known is not None:
            return cls(windows, score, known.to(device), parts)
        kept = []
        for index, ids in enumerate(windows):
            kept.append(parts.hidden(ids[None].to(device))[0, positions].clone())
            if progress is not None:
                progress(index + 1, len(windows))
        hidden = torch.stack(kept)
        if key is not None:
            save_reference(key, windows, score, hidden)
        return cls(windows, score, hidden, parts)

    @property
    def tokens(self) -> int:
        """Positions that are scored, over all windows."""
        positions = scored_positions(self.ids.shape[1], self.score)
        return len(self.ids) * len(range(positions.start, positions.stop))

    @torch.inference_mode()
    def damage(
        self, model: Any, *, limit: int | None = None, progress: Progress | None = None
    ) -> Damage:
        """Compare `model` with the original on every window, or on the first `limit`."""
        windows = self.ids[:limit]
        positions = scored_positions(windows.shape[1], self.score)
        parts = take_apart(model, windows[:1].to(device_of(model)))
        sums = []
        for index, ids in enumerate(windows):
            targets = ids[positions.start + 1 : positions.stop + 1]
            total = torch.zeros(4, dtype=torch.float64)
            start = 0
            pairs = zip(
                self._original(index, positions), _logits(model, parts, ids, positions), strict=True
            )
            for ours, theirs in pairs:
                total += compare(ours, theirs, targets[start : start + len(ours)])
                start += len(ours)
            sums.append(total / start)
            if progress is not None:
                progress(index + 1, len(windows))
        return _summary(torch.stack(sums), len(windows) * (positions.stop - positions.start))

    def _original(self, index: int, positions: slice) -> Iterator[Tensor]:
        if self.hidden is None:
            return _logits(self.original, None, self.ids[index], positions)
        return _head(self.original, self.hidden[index])


def scored_positions(window: int, score: Score) -> slice:
    """Positions of a window whose next token is predicted and scored."""
    if score not in ("half", "all"):
        raise PliantError(f"score is 'half' or 'all', not {score!r}")
    start = window // 2 if score == "half" else 0
    if window - 1 <= start:
        raise PliantError(f"a window of {window} tokens leaves none to score")
    return slice(start, window - 1)


def compare(original: Tensor, other: Tensor, targets: Tensor) -> Tensor:
    """Sums over positions of KL, both negative log-likelihoods, and top-1 agreement: [4] float64.

    original, other: logits [n, vocabulary]; targets: the next tokens [n].
    """
    if original.shape != other.shape:
        raise PliantError(
            f"the models' vocabularies differ: {original.shape[-1]} and {other.shape[-1]} tokens; "
            "damage compares models with the same tokenizer"
        )
    other, targets = other.to(original.device), targets.to(original.device)
    p, q = original.log_softmax(-1), other.log_softmax(-1)
    at = targets[:, None]
    kl = (p.exp() * (p - q)).sum(-1, dtype=torch.float64).sum()
    agree = (p.argmax(-1) == q.argmax(-1)).sum(dtype=torch.float64)
    nll = [-x.gather(1, at).sum(dtype=torch.float64) for x in (p, q)]
    return torch.stack([kl, *nll, agree]).cpu()


def bootstrap_ci95(
    values: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """95% interval of the mean of `values` [n], by resampling them with replacement."""
    generator = np.random.default_rng(seed)
    means = values[generator.integers(0, len(values), (resamples, len(values)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def _logits(model: Any, parts: Parts | None, ids: Tensor, positions: slice) -> Iterator[Tensor]:
    """A model's logits at `positions` of one window, a bounded number of rows at a time."""
    ids = ids[None].to(device_of(model))
    if parts is not None:
        yield from _head(parts, parts.hidden(ids)[0, positions].clone())
        return
    logits = call(model, ids)[0, positions]
    step = rows_per_chunk(logits.shape[-1])
    yield from torch.split(logits, step)


def _head(parts: Parts, hidden: Tensor) -> Iterator[Tensor]:
    step = rows_per_chunk(_vocabulary(parts, hidden))
    for piece in torch.split(hidden, step):
        yield parts.head(piece.clone())  # a copy has the alignment, so the rounding, of any other


def _vocabulary(parts: Parts, hidden: Tensor) -> int:
    weight = getattr(parts.head.module, "weight", None)
    return int(weight.shape[0] if weight is not None else parts.head(hidden[:1]).shape[-1])


def _summary(means: Tensor, tokens: int) -> Damage:
    """means [windows, 4] as `compare` orders them, each a mean over a window's tokens."""
    kl, nll_original, nll, top1 = (float(x) for x in means.mean(0))
    per_window = means[:, 0].numpy()
    return Damage(
        kl=kl,
        kl_ci95=bootstrap_ci95(per_window),
        perplexity=math.exp(min(nll, 700.0)),
        perplexity_original=math.exp(min(nll_original, 700.0)),
        top1=top1,
        tokens=tokens,
        window_kl=tuple(float(x) for x in per_window),
    )
