"""One sequence through a transformers model whose keys and values a policy keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from pliant.cache.encoding import PageShape
from pliant.cache.policy import Entries, Layer, Policy
from pliant.cache.rotary import Rotary
from pliant.errors import PliantError, UnsupportedModelError
from pliant.plan.memory import text_config

LIMITED = "pliant_limited"
_running: ContextVar[LimitedModel] = ContextVar("pliant_limited_model")
_PLAIN = {"is_causal", "position_ids", "use_cache"}  # what changes nothing here


class LimitedModel:
    """A transformers causal language model with one policy a layer.

    make: a policy for a layer, say `functools.partial(H2O, tokens=512)`. The model itself stays as
    it is between calls. UnsupportedModelError for models whose attention cannot be replaced.
    """

    def __init__(self, model: Any, make: Callable[[Layer], Policy]) -> None:
        shape = PageShape.of(model.config)  # refuses what keeps more, or less, than all tokens
        if not model._supports_attention_backend:
            raise UnsupportedModelError(
                f"{type(model).__name__} runs with attention of its own; a KV policy needs a model "
                "that takes its attention from transformers' interface"
            )
        self.model, self.make = model, make
        heads = text_config(model.config).num_attention_heads
        rotary, scale = Rotary.of(model), shape.key_dim**-0.5
        self._layers = [
            Layer(index, shape.layers, heads, shape.kv_heads, shape.key_dim, shape.value_dim,
                  rotary, scale)
            for index in range(shape.layers)
        ]  # fmt: skip
        self.reset()

    def reset(self) -> None:
        """Forget the sequence."""
        self.policies = [self.make(layer) for layer in self._layers]
        self.length = 0

    @property
    def nbytes(self) -> int:
        """Bytes that the policies keep."""
        return sum(policy.nbytes for policy in self.policies)

    @torch.no_grad()
    def __call__(self, tokens: Sequence[int] | Tensor, last: int = 0) -> Tensor:
        """Append a chunk of `tokens` [n]; logits [n or last, vocabulary] after its tokens."""
        device = self.model.get_input_embeddings().weight.device
        ids = torch.as_tensor(tokens, device=device)
        if ids.dim() != 1 or not len(ids):
            raise PliantError("give a chunk of one token or more of one sequence")
        places = torch.arange(self.length, self.length + len(ids), device=device)
        self._places = places
        with _attending(self):
            logits: Tensor = self.model(
                input_ids=ids[None], position_ids=places[None], use_cache=False,
                logits_to_keep=last,
            ).logits  # fmt: skip
        self.length += len(ids)
        return logits[0]

    def attend(
        self, index: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float | None
    ) -> Tensor:
        """What `queries` [heads, n, key_dim] find, [n, heads, value_dim]."""
        kept, layer = self.policies[index], self._layers[index]
        positions = self._places.expand(layer.kv_heads, -1)
        kept.add(Entries(keys, values, positions), queries)
        seen = kept.read(queries)
        scale = layer.scale if scale is None else scale
        found, weights = attention(queries, seen, self._places, scale)
        if kept.observes:
            kept.observe(weights)
        kept.settle()
        return found.transpose(0, 1)


def attention(
    queries: Tensor, seen: Entries, places: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """[heads, n, value_dim] and the weights [heads, n, entries], softmax in 32 bits.

    places [n]: positions of the queries.
    """
    grouped = queries.reshape(len(seen.keys), -1, *queries.shape[1:])  # [kv_heads, each, n, dim]
    scores = (grouped @ seen.keys[:, None].transpose(-1, -2)).float() * scale
    if seen.bias is not None:
        scores += seen.bias[:, None, None]
    hidden = seen.positions[:, None, None] > places[:, None]
    weights = scores.masked_fill_(hidden, -torch.inf).softmax(-1)
    found = weights.to(seen.values.dtype) @ seen.values[:, None]
    return found.flatten(0, 1), weights.flatten(0, 1)


@contextmanager
def _attending(limited: LimitedModel) -> Iterator[None]:
    config = text_config(limited.model.config)
    before, token = config._attn_implementation, _running.set(limited)
    config._attn_implementation = LIMITED
    try:
        yield
    finally:
        config._attn_implementation = before
        _running.reset(token)


def _limited_attention(
    module: Any,
    query: Tensor,  # [1, heads, n, key_dim]
    key: Tensor,  # [1, kv_heads, n, key_dim]
    value: Tensor,  # [1, kv_heads, n, value_dim]
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    special = [
        name
        for name, given in {**kwargs, "attention_mask": attention_mask}.items()
        if given is not None and given is not False and name not in _PLAIN
    ]
    if special:
        raise UnsupportedModelError(
            f"{type(module).__name__} asks its attention for what a KV policy does not do: "
            f"{', '.join(special)}"
        )
    limited = _running.get()
    return limited.attend(module.layer_idx, query[0], key[0], value[0], scaling)[None], None


# No mask function goes with it, so that transformers makes no mask.
AttentionInterface.register(LIMITED, _limited_attention)
