"""A model's next-token logits at chosen positions of a window, without all of them at once.

A transformers model is taken apart into its trunk (tokens to final hidden states) and its head, so
that the original's hidden states can be kept instead of its logits: for a vocabulary of 49152 and a
width of 576 that is 85 times less. What cannot be taken apart is called whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

CHUNK_BYTES = 64 << 20
_PROBE = 8


@dataclass(frozen=True)
class Head:
    """Final hidden states [n, hidden] to logits [n, vocabulary] in 32 bits."""

    module: nn.Module
    scale: float
    softcap: float | None

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self.module(hidden).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


@dataclass(frozen=True)
class Parts:
    """A model taken apart: `head(trunk(ids))` are its logits."""

    trunk: Callable[..., Any]
    head: Head

    def hidden(self, ids: Tensor) -> Tensor:
        """Final hidden states [batch, tokens, hidden] of ids [batch, tokens]."""
        output = self.trunk(input_ids=ids, use_cache=False)
        hidden: Tensor = output.last_hidden_state
        return hidden


def take_apart(model: Any, ids: Tensor) -> Parts | None:
    """The trunk and head of a transformers model, None where their product is not the model.

    ids: [1, tokens], of which a few are tried.
    """
    prefix = getattr(model, "base_model_prefix", "")
    trunk = getattr(model, prefix, None) if prefix else None
    module = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if trunk is None or trunk is model or module is None:
        return None
    config = model.config.get_text_config(decoder=True)
    divisor = getattr(config, "logits_scaling", None)
    scale = getattr(config, "logit_scale", None) or (1.0 / divisor if divisor else 1.0)
    head = Head(module, float(scale), getattr(config, "final_logit_softcapping", None))
    parts = Parts(trunk, head)
    few = ids[:, :_PROBE]
    try:
        ours, theirs = parts.head(parts.hidden(few)), call(model, few)
    except (AttributeError, TypeError, RuntimeError):
        return None
    same = ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3)
    return parts if same else None


def call(model: Any, ids: Tensor) -> Tensor:
    """All logits [batch, tokens, vocabulary] of any callable, in 32 bits."""
    output = model(input_ids=ids) if isinstance(model, nn.Module) else model(ids)
    logits: Tensor = getattr(output, "logits", output)
    return logits.float()


def device_of(model: Any) -> torch.device:
    """Where a model wants its tokens."""
    if isinstance(model, nn.Module):
        # Layers that are read as they run have none of their own: they are on meta.
        held = (p.device for p in model.parameters() if p.device.type != "meta")
        return next(held, torch.device("cpu"))
    return torch.device("cpu")


def rows_per_chunk(vocabulary: int) -> int:
    """Positions whose logits together stay within CHUNK_BYTES."""
    return max(1, math.floor(CHUNK_BYTES / (4 * vocabulary)))
