"""How fast a model reads a prompt and writes an answer."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pliant.cache import DenseCache
from pliant.measure.logits import device_of
from pliant.plan.memory import PREFILL_CHUNK


@dataclass(frozen=True)
class Speed:
    """Tokens a second: of a prompt, and of an answer one token at a time."""

    prefill_tps: float
    decode_tps: float


@torch.inference_mode()
def speed(
    model: Any,
    prompt_tokens: int = 256,
    new_tokens: int = 16,
    repeats: int = 3,
    chunk: int = PREFILL_CHUNK,
    seed: int = 0,
) -> Speed:
    """Median over `repeats` of a prompt of random tokens and a greedy answer, after a warm-up."""
    config = model.config.get_text_config(decoder=True)
    longest = getattr(config, "max_position_embeddings", None) or prompt_tokens + new_tokens
    prompt_tokens = max(1, min(prompt_tokens, longest - new_tokens))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, config.vocab_size, (1, prompt_tokens), generator=generator)
    ids = ids.to(device_of(model))
    cache = DenseCache(config, prompt_tokens + new_tokens)
    _once(model, cache, ids[:, :8], 1, chunk)  # libraries, kernels; a graph is captured for a cache
    times = [_once(model, cache, ids, new_tokens, chunk) for _ in range(repeats)]
    return Speed(
        prefill_tps=prompt_tokens / statistics.median(prefill for prefill, _ in times),
        decode_tps=new_tokens / statistics.median(decode for _, decode in times),
    )


def _once(
    model: Any, cache: DenseCache, ids: Tensor, new_tokens: int, chunk: int
) -> tuple[float, float]:
    """Seconds of prefill and of decoding, from an empty cache."""
    cache.reset()

    def step(piece: Tensor) -> Tensor:
        output = model(input_ids=piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1:].argmax(-1)  # type: ignore[no-any-return]

    started = _now(ids)
    token = ids[:, -1:]
    for piece in torch.split(ids, chunk, dim=1):
        token = step(piece)
    prefilled = _now(ids)
    for _ in range(new_tokens):
        token = step(token)
    return prefilled - started, _now(ids) - prefilled


def _now(like: Tensor) -> float:
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
    return time.perf_counter()
