"""Attention that reads shared keys and values where they lie.

For prompts with a mask, transformers' "sdpa" on a CPU first writes every key and value out once
for each query head that shares it: three times the memory of the cache's own in SmolLM2. The fused
CPU kernel reads them in place.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

GROUPED_SDPA = "pliant_sdpa"

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


AttentionInterface.register(GROUPED_SDPA, grouped_sdpa)
AttentionMaskInterface.register(GROUPED_SDPA, sdpa_mask)
