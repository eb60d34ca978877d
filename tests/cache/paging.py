"""Small page shapes and models that tests of the paged cache share."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from pliant.cache import Chunk, DenseCache, PagedModel, PagedSequence, PagePool, PageShape

torch.set_num_threads(1)

VOCABULARY = 97
PLENTY = 1 << 30


def llama(**options: Any) -> Any:
    """A random Llama with two queries a key."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 24, "initializer_range": 0.2, "max_position_embeddings": 4096,
    }  # fmt: skip
    return AutoModelForCausalLM.from_config(LlamaConfig(**{**settings, **options})).eval()


def random_ids(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def pool_of(
    model: Any, tokens: int = 4, dtype: torch.dtype = torch.float32, budget: int = PLENTY
) -> PagePool:
    return PagePool(PageShape.of(model.config, tokens, dtype), budget)


@torch.no_grad()
def alone(model: Any, ids: list[int], pieces: list[int], dtype: torch.dtype) -> torch.Tensor:
    """Logits [tokens, vocabulary] of one sequence in a dense cache, read in `pieces`."""
    cache = DenseCache(model.config, len(ids), 1, dtype)
    found = [
        model(torch.tensor([part]), past_key_values=cache).logits[0] for part in cut(ids, pieces)
    ]
    return torch.cat(found)


def together(
    paged: PagedModel,
    sequences: list[PagedSequence],
    ids: list[list[int]],
    passes: list[list[int]],
) -> list[torch.Tensor]:
    """Logits [tokens, vocabulary] of each sequence; passes: how many tokens of each, in turn."""
    pieces = [cut(text, [p[i] for p in passes]) for i, text in enumerate(ids)]
    found: list[list[torch.Tensor]] = [[] for _ in ids]
    for number in range(len(passes)):
        some = [i for i in range(len(ids)) if pieces[i][number]]
        chunks = [Chunk(sequences[i], pieces[i][number]) for i in some]
        logits = paged(chunks, every=True).split([len(chunk.tokens) for chunk in chunks])
        for i, own in zip(some, logits, strict=True):
            found[i].append(own)
    return [torch.cat(own) for own in found]


def cut(ids: list[int], pieces: list[int]) -> list[list[int]]:
    found, start = [], 0
    for size in pieces:
        found.append(ids[start : start + size])
        start += size
    return found
