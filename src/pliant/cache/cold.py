"""Which pages may be made smaller, and making room by it.

A sequence's first page stays as it is, since every later token attends to its first tokens
("Efficient Streaming Language Models with Attention Sinks"), and so do its last, which the next
tokens attend to most. With the first page in 16 bits, SmolLM2 is damaged by 0.003 nats a token at 4
bits instead of 0.006, and by 0.014 at 3 bits instead of 0.027.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence

from pliant.cache.encoding import PageShape
from pliant.cache.pages import Page, PagePool
from pliant.cache.sequence import PagedSequence

FIRST_PAGES = 1
LAST_PAGES = 2


def cold_pages(sequence: PagedSequence) -> Iterator[Page]:
    """Pages of `sequence` that may be coded, the oldest first."""
    full = len(sequence) // sequence.pool.shape.tokens
    return iter(sequence.pages[FIRST_PAGES : max(full - LAST_PAGES, 0)])


def hot_tokens(shape: PageShape, tokens: int) -> int:
    """How many of a sequence's `tokens` stay as they are."""
    full = tokens // shape.tokens
    return tokens - shape.tokens * max(full - LAST_PAGES - FIRST_PAGES, 0)


def make_room(
    pool: PagePool,
    sequences: Sequence[PagedSequence],
    wanted: int,
    widths: Iterable[int],
    seconds: float = float("inf"),
) -> int:
    """Code cold pages until `wanted` bytes are free that were not; returns the bytes.

    widths: that pages come to, one after the other: all cold pages have one before any has the
    next. The sequences that stand first give first. After so many seconds it stops.
    """
    freed, until = 0, time.monotonic() + seconds
    for bits in widths:
        if bits >= pool.shape.bits:
            continue
        for sequence in sequences:
            for page in cold_pages(sequence):
                if freed >= wanted or time.monotonic() > until:
                    return freed
                if page.bits > bits:
                    freed += pool.recode(page, bits)
    return freed


def room_in(pool: PagePool, sequences: Sequence[PagedSequence], bits: int) -> int:
    """Bytes that `make_room` could free by coming to `bits`."""
    goal = pool.shape.nbytes(bits)
    pages = {id(page): page for sequence in sequences for page in cold_pages(sequence)}
    return sum(max(page.data.nbytes - goal, 0) for page in pages.values())
