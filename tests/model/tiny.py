"""Tiny randomly initialised models of every family, saved the way a user would have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as t

_COMMON: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_HEADED = {**_COMMON, "head_dim": 16}
_GEMMA = {**_HEADED, "sliding_window": 8, "query_pre_attn_scalar": 16}


def configurations() -> dict[str, Any]:
    return {
        "llama": t.LlamaConfig(**_COMMON),
        "llama_tied": t.LlamaConfig(**_COMMON, tie_word_embeddings=True),
        "qwen2": t.Qwen2Config(**_COMMON),
        "qwen3": t.Qwen3Config(**_HEADED),
        "gemma2": t.Gemma2Config(**_GEMMA),
        "gemma3": t.Gemma3TextConfig(**_GEMMA, sliding_window_pattern=2),
        "mistral": t.MistralConfig(**_COMMON, sliding_window=8),
        "phi": t.PhiConfig(**_COMMON),
        "phi3": t.Phi3Config(**_COMMON),
        "gpt2": t.GPT2Config(
            vocab_size=320, n_embd=64, n_layer=3, n_head=4, n_positions=128,
            bos_token_id=1, eos_token_id=2,
        ),
        "mixtral": t.MixtralConfig(**_COMMON, num_local_experts=4, num_experts_per_tok=2),
        "qwen3_moe": t.Qwen3MoeConfig(
            **_HEADED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64
        ),
        "gpt_oss": t.GptOssConfig(
            **_HEADED, num_local_experts=4, num_experts_per_tok=2, sliding_window=8
        ),
        "opt": t.OPTConfig(
            vocab_size=320, hidden_size=64, ffn_dim=128, num_hidden_layers=3,
            num_attention_heads=4, max_position_embeddings=128, word_embed_proj_dim=64,
        ),
        "bloom": t.BloomConfig(vocab_size=320, hidden_size=64, n_layer=3, n_head=4),
        "gpt_neox": t.GPTNeoXConfig(**_COMMON),
        "falcon": t.FalconConfig(
            vocab_size=320, hidden_size=64, num_hidden_layers=3, num_attention_heads=4
        ),
        "olmo2": t.Olmo2Config(**_COMMON),
        "stablelm": t.StableLmConfig(**_COMMON),
        "cohere": t.CohereConfig(**_COMMON),
        "granite": t.GraniteConfig(**_COMMON),
    }  # fmt: skip


def build(config: Any, seed: int = 0) -> Any:
    """A random model whose logits are far from uniform, in eval mode."""
    torch.manual_seed(seed)
    model = t.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=0.1)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def save(config: Any, directory: Path, **options: Any) -> Any:
    """Save a random model of `config` under `directory` and return it."""
    model = build(config)
    model.save_pretrained(directory, **options)
    return model
