"""A tiny random Llama with a tokenizer of bytes, as a checkpoint on disk."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

RECIPE = {
    "calibration": {"sequences": 4, "length": 32},
    "search": {"measurements": 3, "sequences": 1},
    "rules": [{"rungs": [{"method": "rtn", "bits": b, "group_size": 32} for b in (2, 4, 8)]}],
}
CONTEXT = 64


def save_tiny(directory: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128,
        tie_word_embeddings=True, initializer_range=0.2,
        bos_token_id=256, eos_token_id=257, pad_token_id=257,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)}
    plain = Tokenizer(models.BPE({**vocabulary, "<s>": 256, "</s>": 257}, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(directory)
    return directory


def save_recipe(path: Path) -> Path:
    path.write_text(json.dumps(RECIPE))  # JSON is YAML
    return path


def memory(directory: Path, weights: int = 80_000) -> int:
    """A budget that leaves so many bytes for weights at CONTEXT (the rungs: 45 to 135 kB)."""
    from pliant.plan import activation_bytes, kv_cache_bytes

    config = LlamaConfig.from_pretrained(directory)
    return kv_cache_bytes(config, CONTEXT, 1) + activation_bytes(config, CONTEXT, 1) + weights


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir())}
