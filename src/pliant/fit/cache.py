"""The last step of a fit: what a KV cache of fewer bits costs its model."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pliant.ladder.cache_record import CacheRecord, write_record
from pliant.measure.cache_damage import cache_damage
from pliant.measure.damage import Progress


def measure_cache(
    model: Any, ids: Tensor, text: str, progress: Progress | None = None
) -> CacheRecord:
    """Measure an opened artifact's cache on windows of token ids [n, tokens], and keep it there.

    text: where the ids are from. UnsupportedModelError where its cache cannot be paged.
    """
    damage = cache_damage(model, ids, progress=progress)
    scored = len(ids) * (ids.shape[1] - ids.shape[1] // 2)
    record = CacheRecord(damage=damage, text=text, tokens=scored, window=ids.shape[1])
    write_record(model.artifact.directory, record)
    return record
