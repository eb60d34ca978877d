"""A model of an architecture in random codes of one kind, to time a token of."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from pliant.bench.samples import Sample, group_levels
from pliant.bench.timing import time_calls
from pliant.cache import DenseCache
from pliant.cache.dense import DenseLayer
from pliant.codes.base import one_thread
from pliant.kernels.cpu import integer_activations
from pliant.model import coded_model, empty_model, find_targets
from pliant.plan.memory import text_config
from pliant.run import RunningModel

SAMPLE: Sample = partial(group_levels, bits=4)
"""Its kind of code: a fast one, so that what is between the products stands out."""

_TOKENS = 10  # times as long as a product: all other sizes hang on it
LOW, HIGH = 16, 512
"""Tokens in the cache when a token is timed."""


def stand_in_layers(config: Any, nbytes: int) -> list[int]:
    """Depths of the models to time, rising: all layers, or as many of 4 bits as take `nbytes`.

    These are two at least, and then half of them also: what they differ in is layers alone.
    """
    layers = int(text_config(config).num_hidden_layers)
    inside = [t for t in find_targets(empty_model(config)) if t.block is not None]
    each = sum(t.shape[0] * t.shape[1] for t in inside) // (2 * max(layers, 1))
    most = max(2, -(-nbytes // max(each, 1)))
    return [layers] if most >= layers else [most // 2, most]


class StandIn:
    """A running model with the weights of nothing: random integers, norms of one."""

    def __init__(self, config: Any, batch: int, device: torch.device) -> None:
        empty = empty_model(config)
        targets = find_targets(empty)
        taken = {name for t in targets for name in (t.parameter, *t.tied)}
        others = {
            name: torch.ones(p.shape) for name, p in empty.named_parameters() if name not in taken
        }
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        codes = {t.name: SAMPLE(*t.shape) for t in targets}
        self.model = coded_model(config, codes, others, dtype).to(device)
        self.batch, self.device = batch, device
        self._plain = type(self.model)
        self.model.__class__ = type(
            self._plain.__name__,
            (RunningModel, self._plain),
            {"__module__": self._plain.__module__},
        )
        self.model.plan = SimpleNamespace()

    def takes_step(self) -> bool:
        """Whether one native call, or one CUDA graph, computes a token of this model."""
        cache = self._cache(2)
        logits = torch.empty(text_config(self.model.config).vocab_size, device=self.device)
        return bool(self.model.step(1, cache, logits))

    def seconds(self, step: bool, budget: float) -> dict[str, float] | None:
        """Of one token, by how many the cache holds.

        step: in one native call, or None where there is none for this model.
        """
        if step and not self.takes_step():
            return None
        config = text_config(self.model.config)
        longest = getattr(config, "max_position_embeddings", None) or HIGH + 2
        high = min(HIGH, longest - 2)
        low = min(LOW, high // 2)
        cache = self._cache(high + 2)
        ids = torch.ones(self.batch, 1, dtype=torch.long, device=self.device)
        options: dict[str, Any] = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        found = {}
        for position in (low, high):

            def token(_: int, position: int = position) -> Tensor:
                for layer in cache.layers:
                    layer.length = position
                if step:
                    output = self.model(input_ids=ids, **options)
                else:
                    with one_thread(), integer_activations():
                        output = self._plain.__call__(self.model, input_ids=ids, **options)
                return output.logits[:, -1:].argmax(-1)  # type: ignore[no-any-return]

            found[str(position)] = time_calls(token, _TOKENS * budget, self.device)
        return found

    @torch.inference_mode()
    def _cache(self, context: int) -> DenseCache:
        """A cache whose storage is there and holds zeros."""
        cache = DenseCache(text_config(self.model.config), context, self.batch)
        ids = torch.ones(self.batch, 1, dtype=torch.long, device=self.device)
        with one_thread():
            self._plain.__call__(self.model, input_ids=ids, past_key_values=cache, use_cache=True)
        for layer in cache.layers:
            if isinstance(layer, DenseLayer):
                layer.keys.zero_(), layer.values.zero_()
        return cache
