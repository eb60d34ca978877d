"""Attention that reads shared keys and values where they lie.

With a mask, transformers' "sdpa" first writes every key and value out once for each query head
that shares it: three times the memory of the cache's own in SmolLM2. For prompts on a CPU the fused
kernel reads them in place; for one query a sequence two batched products do, on any device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

GROUPED_SDPA = "pliant_sdpa"
_ONE_QUERY = "pliant_one_query"

_SPECIAL = ("position_bias", "cache", "softcap", "output_attentions", "s_aux")


def grouped_sdpa(
    module: Any,
    query: Tensor,  # [batch, heads, tokens, head_dim]
    key: Tensor,  # [batch, kv_heads, length, head_dim]
    value: Tensor,  # [batch, kv_heads, length, head_dim]
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' sdpa attention, [batch, tokens, heads, head_dim], without the expansion."""
    expands = query.shape[2] > 1 and query.shape[1] > key.shape[1] and attention_mask is not None
    special = any(kwargs.get(name) is not None for name in _SPECIAL) or query.requires_grad
    if not expands or special or query.device.type != "cpu":
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
    out = F.scaled_dot_product_attention(
        query, key, value, attention_mask, dropout, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2).contiguous(), None


def use_grouped_sdpa(model: Any) -> None:
    """Let `model` attend this way wherever it would use transformers' sdpa."""
    if getattr(model.config, "_attn_implementation", None) == "sdpa":
        model.set_attn_implementation(GROUPED_SDPA)


def one_query(
    module: Any,
    query: Tensor,  # [batch, heads, 1, head_dim]
    key: Tensor,  # [batch, kv_heads, length, head_dim]
    value: Tensor,  # [batch, kv_heads, length, head_dim]
    attention_mask: Tensor,  # bool [batch or 1, 1, 1, length], what each query sees
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention [batch, 1, heads, head_dim] of one query a sequence, softmax in 32 bits.

    RuntimeError for attention with more to it than keys, values and a mask.
    """
    if query.shape[2] != 1 or any(kwargs.get(name) is not None for name in _SPECIAL):
        raise RuntimeError("this attention is for one plain query a sequence")
    batch, heads, _, size = query.shape
    grouped = query.view(batch, key.shape[1], heads // key.shape[1], size)
    scores = (grouped @ key.transpose(-1, -2)).float()
    scores = scores * (size**-0.5 if scaling is None else scaling)
    shares = scores.masked_fill(~attention_mask, -float("inf")).softmax(-1).to(value.dtype)
    return (shares @ value).view(batch, 1, heads, size), None


@contextmanager
def attending_one_query(model: Any) -> Iterator[None]:
    """`model` attends with `one_query` inside; it must be given a mask of four dimensions."""
    before = model.config._attn_implementation
    model.set_attn_implementation(_ONE_QUERY)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


AttentionInterface.register(GROUPED_SDPA, grouped_sdpa)
AttentionMaskInterface.register(GROUPED_SDPA, sdpa_mask)
AttentionInterface.register(_ONE_QUERY, one_query)
AttentionMaskInterface.register(_ONE_QUERY, sdpa_mask)
