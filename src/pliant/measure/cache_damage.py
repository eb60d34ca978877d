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
    count, half = len(ids), ids.shape[1] // 2
    kept = (pool.shape.bits, *widths)
    runs = [PagedSequence(pool) for _ in range(len(kept) * count)]
    total, scored = [0.0 for _ in widths], 0
    starts = range(0, ids.shape[1], CHUNK)
    for done, start in enumerate(starts, 1):
        part = ids[:, start : start + CHUNK].tolist() * len(kept)
        chunks = [Chunk(sequence, tokens) for sequence, tokens in zip(runs, part, strict=True)]
        logits = paged(chunks, every=True)
        logits = logits.view(len(kept), count, -1, logits.shape[-1])
        exact, *coded = logits[:, :, min(max(half - start, 0), len(part[0])) :]
        exact = exact.float().log_softmax(-1)
        for index, found in enumerate(coded):
            difference = exact - found.float().log_softmax(-1)
            total[index] += float((exact.exp() * difference).sum())
        scored += exact[..., 0].numel()
        for index, sequence in enumerate(runs):
            bits = kept[index // count]
            for page in cold_pages(sequence):
                if page.bits > bits:
                    pool.recode(page, bits)
        if progress is not None:
            progress(done, len(starts))
    return {bits: max(each / scored, 0.0) for bits, each in zip(widths, total, strict=True)}
