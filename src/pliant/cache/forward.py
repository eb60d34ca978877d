"""Many sequences of different lengths through a transformers model in one pass.

New tokens of all sequences, one of each that decodes and several of each that is being read, are
packed into one row [1, total] with their positions; all but attention works on tokens one by one,
and attention reads each sequence's own pages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from pliant.cache.encoding import PageShape
from pliant.cache.paged import PagedBatch
from pliant.cache.pages import PagePool
from pliant.cache.sequence import PagedSequence
from pliant.errors import PliantError, UnsupportedModelError
from pliant.model.attention import GROUPED_SDPA

PAGED = "pliant_paged"
_batch: ContextVar[PagedBatch] = ContextVar("pliant_paged_batch")
_PLAIN = {"is_causal", "position_ids", "use_cache"}  # what changes nothing here


@dataclass(frozen=True)
class Chunk:
    """Token ids to append to a sequence: one to decode, several to read a prompt.

    decode: they are of an answer. Where there is a kernel for that, a token's numbers depend on
    which of both it is read as, and on nothing else.
    """

    sequence: PagedSequence
    tokens: Sequence[int]
    decode: bool = False


class PagedModel:
    """A transformers causal language model that reads and writes pages.

    The model itself stays as it is, and usable in any other way between passes.
    UnsupportedModelError for one with sliding windows, layers without attention, or attention that
    cannot be replaced.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.shape = PageShape.of(model.config)
        name, attention = type(model).__name__, model.config._attn_implementation
        if attention not in ("sdpa", GROUPED_SDPA) or not model._supports_attention_backend:
            raise UnsupportedModelError(
                f"{name} runs with its own {attention} attention; a paged cache needs a model that "
                "takes its attention from transformers' interface, set to sdpa"
            )
        if getattr(model.config.get_text_config(decoder=True), "alibi", False):
            raise UnsupportedModelError(
                f"{name} adds a bias for positions to its attention, which a paged cache lacks"
            )

    @torch.no_grad()
    def __call__(self, chunks: Sequence[Chunk], every: bool = False) -> Tensor:
        """Append each chunk to its sequence; logits [chunks, vocabulary] after its last token.

        every: logits [total, vocabulary] after every token, chunk after chunk. On any error the
        sequences are as before; OutOfPages where their pool has no room for all chunks.
        """
        pool = self.check(chunks)
        with extended(chunks) as lengths:
            return self._run(pool, chunks, lengths, every)

    def _run(
        self, pool: PagePool, chunks: Sequence[Chunk], lengths: Sequence[int], every: bool
    ) -> Tensor:
        counts = [len(chunk.tokens) for chunk in chunks]
        tokens = [token for chunk in chunks for token in chunk.tokens]
        positions = [
            position
            for length, count in zip(lengths, counts, strict=True)
            for position in range(length, length + count)
        ]
        ends = torch.tensor(counts).cumsum(0) - 1
        ids, places = torch.tensor([tokens, positions], device=pool.device)[:, None]
        batch = PagedBatch(pool, [chunk.sequence for chunk in chunks], counts)
        with _attending(self.model, batch):
            logits: Tensor = self.model(
                input_ids=ids,
                position_ids=places,
                use_cache=False,
                logits_to_keep=0 if every else ends.to(pool.device),
            ).logits
        return logits[0]

    def check(self, chunks: Sequence[Chunk]) -> PagePool:
        """The pool of `chunks`; PliantError for what cannot share a pass."""
        if not chunks or not all(chunk.tokens for chunk in chunks):
            raise PliantError("a pass needs at least one sequence, and a token for each")
        if len({id(chunk.sequence) for chunk in chunks}) < len(chunks):
            raise PliantError("a sequence can have one chunk in a pass")
        if any(chunk.sequence.swapped for chunk in chunks):
            raise PliantError("a sequence in this pass is swapped out; swap it in first")
        pools = {chunk.sequence.pool for chunk in chunks}
        if len(pools) > 1:
            raise PliantError("sequences of different pools cannot share a pass")
        pool = pools.pop()
        shape, own = pool.shape, self.shape
        if (shape.layers, shape.kv_heads, shape.key_dim, shape.value_dim) != (
            own.layers, own.kv_heads, own.key_dim, own.value_dim,
        ):  # fmt: skip
            raise PliantError(f"pages of {shape} are not this model's, which are {own}")
        return pool


@contextmanager
def extended(chunks: Sequence[Chunk]) -> Iterator[list[int]]:
    """Each sequence is longer by its chunk inside, and stays so unless there is an error; lengths
    before.
    """
    lengths = [len(chunk.sequence) for chunk in chunks]
    try:
        for chunk in chunks:
            chunk.sequence.extend(chunk.tokens)
        yield lengths
    except BaseException:
        for chunk, length in zip(chunks, lengths, strict=True):
            chunk.sequence.truncate(length)
        raise


@contextmanager
def _attending(model: Any, batch: PagedBatch) -> Iterator[None]:
    """`model` attends over `batch` inside."""
    config = model.config.get_text_config(decoder=True)
    before, token = config._attn_implementation, _batch.set(batch)
    config._attn_implementation = PAGED
    try:
        yield
    finally:
        config._attn_implementation = before
        _batch.reset(token)


def _paged_attention(
    module: Any,
    query: Tensor,  # [1, heads, total, key_dim]
    key: Tensor,  # [1, kv_heads, total, key_dim]
    value: Tensor,  # [1, kv_heads, total, value_dim]
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """[1, total, heads, value_dim], for transformers' attention modules inside `_attending`."""
    special = [
        name
        for name, given in {**kwargs, "attention_mask": attention_mask}.items()
        if given is not None and given is not False and name not in _PLAIN
    ]
    if special:
        raise UnsupportedModelError(
            f"{type(module).__name__} asks its attention for what a paged cache does not do: "
            f"{', '.join(special)}"
        )
    return _batch.get().attend(module.layer_idx, query, key, value, scaling), None


# No mask function goes with it, so that transformers makes no mask.
AttentionInterface.register(PAGED, _paged_attention)
