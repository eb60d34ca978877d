"""What coded KV pages cost: the damage of each width, weights as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pliant.cache import CODED_BITS, Chunk, PagedModel, PagedSequence, PagePool
from pliant.cache.cold import cold_pages
from pliant.measure.damage import Progress

CHUNK = 32
"""Tokens read at a time: what they attend to before them is coded, as it is while an answer grows
(all but a sequence's first page and its last two)."""

_PLENTY = 1 << 62


@torch.inference_mode()
def cache_damage(
    model: Any,
    ids: Tensor,
    widths: Sequence[int] = CODED_BITS,
    progress: Progress | None = None,
) -> dict[int, float]:
    """Mean KL divergence, nats a token, of `model` with its cache in each width from 16 bits.

    model: of transformers, which a paged cache can serve (else UnsupportedModelError). ids: windows
    of text [n, tokens], of which the second half is scored. progress: told (done, of) in chunks.
    """
    paged = PagedModel(model)
    pool = PagePool(paged.shape, _PLENTY, ids.device)
    half = ids.shape[1] // 2
    runs = {bits: [PagedSequence(pool) for _ in ids] for bits in (pool.shape.bits, *widths)}
    total, count, done = dict.fromkeys(widths, 0.0), 0, 0
    starts = range(0, ids.shape[1], CHUNK)
    for start in starts:
        part = ids[:, start : start + CHUNK].tolist()
        first = min(max(half - start, 0), len(part[0]))
        logprobs: dict[int, Tensor] = {}
        for bits, sequences in runs.items():
            chunks = [Chunk(s, tokens) for s, tokens in zip(sequences, part, strict=True)]
            logits = paged(chunks, every=True)
            logits = logits.view(len(ids), -1, logits.shape[-1])
            logprobs[bits] = logits[:, first:].float().log_softmax(-1).flatten(0, 1)
            for sequence in sequences:
                for page in cold_pages(sequence):
                    if page.bits > bits:
                        pool.recode(page, bits)
            done += 1
            if progress is not None:
                progress(done, len(starts) * len(runs))
        exact = logprobs.pop(pool.shape.bits)
        for bits, found in logprobs.items():
            total[bits] += float((exact.exp() * (exact - found)).sum())
        count += len(exact)
    return {bits: max(total[bits] / count, 0.0) for bits in widths}
