"""One token after another for many sequences at once, as fast as the machine allows."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from pliant.kernels.streams import aside
from pliant.model import StreamedModel
from pliant.model.attention import attending_one_query

Follow = Callable[[Tensor, int], Tensor]

_LOG = logging.getLogger(__name__)
_AGREEMENT = 0.05  # of logits in 16 bits


def stepper(model: StreamedModel, sequences: int, length: int) -> Follow:
    """A function of (ids [sequences, 1], position): the logits [sequences, V] of what follows.

    Positions are asked for in order, from 0 to length - 1. On a GPU a step is replayed as a CUDA
    graph where the model allows it.
    """
    if model.device.type == "cuda" and _one_attention(model, length):
        steps = FixedSteps(model, sequences, length)
        if steps.capture():
            return steps
    return _GrowingSteps(model)


def _one_attention(model: StreamedModel, length: int) -> bool:
    """Whether each token looks at all before it, in every layer, and all layers are attention."""
    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    windowed = kinds != {"full_attention"} or bool(getattr(config, "use_sliding_window", True))
    return kinds <= {"full_attention", "sliding_attention"} and (
        not windowed or window is None or window >= length
    )


class _GrowingSteps:
    """The model's own way: a cache that grows by a token a step."""

    def __init__(self, model: StreamedModel) -> None:
        self._model = model
        self._cache: Any = DynamicCache(config=model.config)

    def __call__(self, ids: Tensor, position: int) -> Tensor:
        logits: Tensor = self._model.module(
            input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        ).logits
        return logits[:, -1]


class _Room(DynamicCache):  # type: ignore[misc]
    """A cache with room for whole sequences that is written at `position` and never moves."""

    def __init__(self, length: int, position: Tensor) -> None:
        super().__init__()
        self._length, self._position = length, position
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """All keys and values [n, heads, length, D], those of this step at their position."""
        if layer_idx not in self._kept:
            self._kept[layer_idx] = tuple(  # type: ignore[assignment]
                new.new_zeros(*new.shape[:2], self._length, new.shape[-1])
                for new in (key_states, value_states)
            )
        for kept, new in zip(self._kept[layer_idx], (key_states, value_states), strict=True):
            kept.index_copy_(2, self._position, new)
        return self._kept[layer_idx]


class FixedSteps:
    """Steps whose every tensor stays where it is, so that one can be captured and replayed."""

    def __init__(self, model: StreamedModel, sequences: int, length: int) -> None:
        device = model.device
        self._module = model.module
        self._ids = torch.zeros(sequences, 1, dtype=torch.long, device=device)
        self._position = torch.zeros(1, dtype=torch.long, device=device)
        self._seen = torch.zeros(1, 1, 1, length, dtype=torch.bool, device=device)
        self._cache = _Room(length, self._position)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None

    def __call__(self, ids: Tensor, position: int) -> Tensor:
        self._ids.copy_(ids)
        self._position.fill_(position)
        self._seen[..., position] = True
        if self._graph is None or self._logits is None:
            return self._step()
        self._graph.replay()
        return self._logits

    def _step(self) -> Tensor:
        # What the model writes is text of its own in 16 bits as well, at half the bytes a step.
        kind = self._ids.device.type
        half = torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda", cache_enabled=False)
        with half, attending_one_query(self._module):
            logits: Tensor = self._module(
                input_ids=self._ids, position_ids=self._position[None], attention_mask=self._seen,
                past_key_values=self._cache, use_cache=True, logits_to_keep=1,
            ).logits  # fmt: skip
        return logits[:, -1]

    @torch.no_grad()
    def capture(self) -> bool:
        """Whether a step has become a CUDA graph that gives the step's own logits."""
        device = self._ids.device
        graph = torch.cuda.CUDAGraph()
        try:
            self(self._ids.clone(), 0)
            with aside(device):
                own = self._step().float()
            with torch.cuda.graph(graph):
                self._logits = self._step()
        except (RuntimeError, ValueError) as error:  # it chooses by values, waits, or attends so
            torch.cuda.synchronize(device)
            _LOG.info("writing without a CUDA graph: %s", error)
            return False
        graph.replay()
        apart = torch.linalg.vector_norm(self._logits.float() - own)
        if not bool(apart <= _AGREEMENT * torch.linalg.vector_norm(own)):
            _LOG.info("writing without a CUDA graph: its logits differ")
            return False
        self._graph = graph
        return True
