"""Opening an artifact as a model that generates inside its plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pliant.cache import DenseCache
from pliant.codes.base import one_thread
from pliant.ladder import LiveModel
from pliant.ladder import load as open_model
from pliant.model.heap import release
from pliant.plan.memory import PREFILL_CHUNK


class RunningModel(LiveModel):
    """A live model whose `generate` uses a cache of the planned size and prefills in chunks."""

    def new_cache(self) -> DenseCache:
        """An empty cache of the planned context and batch."""
        config: Any = self.config  # type: ignore[attr-defined]
        return DenseCache(config, self.plan.context, self.plan.batch)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, fit for its size.

        A single token runs in one thread, whose pieces of work are too short to share. After more
        than one, what they freed goes back to the system.
        """
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is not None and ids.shape[-1] == 1:
            with one_thread():
                return super().__call__(*args, **kwargs)  # type: ignore[misc]
        output = super().__call__(*args, **kwargs)  # type: ignore[misc]
        release()
        return output

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' own generate; pass `past_key_values` or `use_cache` to choose a cache."""
        if not {"past_key_values", "use_cache", "cache_implementation"} & kwargs.keys():
            kwargs["past_key_values"] = self.new_cache()
            given = getattr(kwargs.get("generation_config"), "prefill_chunk_size", None)
            kwargs.setdefault("prefill_chunk_size", given or PREFILL_CHUNK)
        return super().generate(*args, **kwargs)  # type: ignore[misc]


def load(
    directory: str | Path,
    memory: int | str | None = None,
    weights: int | str | None = None,
    context: int | None = None,
    batch: int | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """Open an artifact at a size: a transformers model with `artifact`, `plan` and `resize`.

    memory: bytes in total, for `context` tokens in each of `batch` sequences; weights: bytes of
    weights alone; sizes as numbers or text ("128MiB"). dtype: what it computes in.
    """
    return open_model(directory, memory, weights, context, batch, dtype, RunningModel)
