"""Many sequences in one pass over their pages: natively where it can be, else through transformers.

What makes the native pass worth it besides its speed: a token's numbers depend on the sequence
before it and on whether it is read as a prompt or as an answer, and on nothing else. Whoever shares
the pass, however a prompt is cut, and whether pages are shared, the bits are the same.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from pliant.cache import Chunk, PagedModel, PagedSequence, PagePool, extended
from pliant.errors import PliantError
from pliant.kernels.cpu import multiplies_words
from pliant.run.step import NativeStep, Pages

MOST_ROWS = 16
"""Sequences that decode in one native call: products of more take other kernels."""


class PackedModel:
    """A RunningModel that reads and writes pages; see PagedModel, which it falls back to."""

    def __init__(self, model: Any) -> None:
        self.model, self._paged = model, PagedModel(model)
        self.shape = self._paged.shape

    @torch.no_grad()
    def __call__(self, chunks: Sequence[Chunk], every: bool = False) -> Tensor:
        """Append each chunk to its sequence; logits [chunks, vocabulary] after its last token.

        every: logits [total, vocabulary] after every token, chunk after chunk. On any error the
        sequences are as before; OutOfPages where their pool has no room for all chunks.
        """
        pool = self._paged.check(chunks)
        native = self._native(pool)
        if native is None:
            return self._paged(chunks, every)
        worst = max(max(chunk.tokens) for chunk in chunks)
        if worst >= native.vocabulary or min(min(chunk.tokens) for chunk in chunks) < 0:
            raise PliantError(f"token {worst} is not one of {native.vocabulary}")
        with extended(chunks) as lengths, torch.inference_mode(False):
            return self._every(native, chunks, lengths) if every else _last(native, chunks, lengths)

    def _native(self, pool: PagePool) -> NativeStep | None:
        """What runs it natively, for the model as it is now."""
        make = getattr(self.model, "native_step", None)
        if make is None or pool.device.type != "cpu" or pool.shape.dtype != torch.bfloat16:
            return None
        if self.shape.key_dim != self.shape.value_dim or not multiplies_words():
            return None
        found: NativeStep | None = make()
        return found

    def _every(self, native: NativeStep, chunks: Sequence[Chunk], lengths: Sequence[int]) -> Tensor:
        hidden = self.model.config.get_text_config(decoder=True).hidden_size
        found = []
        for chunk, length in zip(chunks, lengths, strict=True):
            states = torch.empty(len(chunk.tokens), hidden)
            _read(native, chunk, length, states)
            found.append(states)
        logits: Tensor = self.model.lm_head(torch.cat(found))
        return logits


def _last(native: NativeStep, chunks: Sequence[Chunk], lengths: Sequence[int]) -> Tensor:
    """Logits [chunks, vocabulary] after the last token of each."""
    out = torch.empty(len(chunks), native.vocabulary)
    size = chunks[0].sequence.pool.shape.tokens
    decoding = [place for place, chunk in enumerate(chunks) if chunk.decode]
    for start in range(0, len(decoding), MOST_ROWS):
        some = decoding[start : start + MOST_ROWS]
        if any(len(chunks[place].tokens) != 1 for place in some):
            raise PliantError("an answer is read one token a pass")
        rows = [(chunks[p].tokens[0], lengths[p], _pages(chunks[p].sequence)) for p in some]
        whole = some[-1] - some[0] == len(some) - 1
        to = out[some[0] : some[-1] + 1] if whole else torch.empty(len(some), native.vocabulary)
        _done(native.rows(rows, size, to))
        if not whole:
            out[torch.tensor(some)] = to
    for place, chunk in enumerate(chunks):
        if not chunk.decode:
            _read(native, chunk, lengths[place], out[place])
    return out


def _read(native: NativeStep, chunk: Chunk, length: int, out: Tensor) -> None:
    """A piece of a prompt; out: logits after it, or states of its tokens."""
    size = chunk.sequence.pool.shape.tokens
    _done(native.paged_prompt(chunk.tokens, length, _pages(chunk.sequence), size, out))


def _done(done: bool) -> None:
    if not done:
        raise MemoryError("the system gives no more threads")


def _pages(sequence: PagedSequence) -> Pages:
    return array("q", chain.from_iterable((page.address, page.bits) for page in sequence.pages))
