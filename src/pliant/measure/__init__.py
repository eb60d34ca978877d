"""Damage, perplexity, speed, memory and the report: looks at every stage from outside."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pliant.measure.damage import Damage, Progress, Reference, Score
from pliant.measure.memory import growth_of, peak_resident_bytes, resident_bytes, tensor_bytes
from pliant.measure.speed import Speed, speed
from pliant.observe.text import WINDOW, load_text, split, windows

__all__ = [
    "WINDOW",
    "Damage",
    "Reference",
    "Speed",
    "growth_of",
    "load_text",
    "measure",
    "peak_resident_bytes",
    "resident_bytes",
    "speed",
    "split",
    "tensor_bytes",
    "windows",
]


def measure(
    model: Any,
    against: Any,
    text: str | Tensor,
    tokenizer: Any = None,
    *,
    window: int = WINDOW,
    score: Score = "half",
    limit: int | None = None,
    timed: bool = True,
    key: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare `model` with the original, `against`, both opened; the result is JSON-able.

    against: a model, or a `Reference` made before (text and window are then its own). text: a
    string, or windows of token ids [n, window]. limit: at most so many windows. timed: measure
    speed as well (prefill_tps and decode_tps are None without). key: the original's fingerprint,
    under which its side is cached. progress: told (done, of) in windows of both passes together.
    """
    if isinstance(against, Reference):
        reference, before = against, 0
    else:
        ids = windows(text, tokenizer, window, limit) if isinstance(text, str) else text[:limit]
        before = len(ids)
        reference = Reference.of(
            against, ids, score, key=key, progress=_shifted(progress, 0, 2 * before)
        )
    count = len(reference.ids[:limit])
    found = reference.damage(
        model, limit=limit, progress=_shifted(progress, before, before + count)
    )
    pace = speed(model) if timed else None
    return found.as_dict() | {
        "weight_bytes": tensor_bytes(model),
        "prefill_tps": pace.prefill_tps if pace else None,
        "decode_tps": pace.decode_tps if pace else None,
        "window": reference.ids.shape[1],
        "windows": count,
        "score": reference.score,
    }


def _shifted(progress: Progress | None, done: int, total: int) -> Progress | None:
    if progress is None:
        return None
    return lambda now, _: progress(done + now, total)
