"""A pool of pages that hold keys and values, within a budget of bytes that can change.

Source: "Efficient Memory Management for Large Language Model Serving with PagedAttention".

A page is one tensor with the keys and values of a few tokens in all layers. All layers: pages of
one layer would copy the same bytes when a layer is gathered, with as many times the tables and
holders as there are layers. A tensor each, not slabs of many: the bytes are exactly those held, and
a shrink needs no compaction. To gather 2k tokens of SmolLM2's 30 layers then takes 6.2 ms, as from
8 slabs; one slab for all pages, which could not be shrunk, takes 3.9.

Freed pages go back to the system: of 1,000 pages of 360 KiB, half were dropped in random order
after a shrink, and the process fell from 353 to 179 MiB, of which 176 were held. Pages of a few
KiB, which only tiny models have, share the system's own pages and come back in part.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pliant.budget import format_size
from pliant.cache.encoding import PageShape, decode, encode
from pliant.codes.base import one_thread
from pliant.errors import PliantError
from pliant.model.heap import release


class OutOfPages(PliantError):
    """A pool has no room for what was asked; nothing was taken.

    wanted: bytes asked for. free: bytes that were left, below 0 after the budget shrank.
    """

    def __init__(self, wanted: int, free: int, reason: str = "") -> None:
        self.wanted, self.free = wanted, free
        super().__init__(
            reason
            or f"the KV cache has {format_size(free)} free of the {format_size(wanted)} asked for; "
            "finish, swap out or shorten a sequence, make pages smaller, or raise the budget"
        )


class Page:
    """Keys and values of some tokens: [layers, tokens, width], or uint8 codes [layers, bytes].

    holders: sequences and trees that hold it. address: of its data. Change it through its pool
    only.
    """

    __slots__ = ("_data", "address", "bits", "holders")

    def __init__(self, data: Tensor, bits: int) -> None:
        self.data, self.bits, self.holders = data, bits, 1

    @property
    def data(self) -> Tensor:
        return self._data

    @data.setter
    def data(self, data: Tensor) -> None:
        self._data, self.address = data, data.data_ptr()


class PagePool:
    """Pages of one shape on one device, at most `budget` bytes of them.

    reclaim: called with a number of bytes when room is short; it may free that many, or fewer.
    """

    def __init__(self, shape: PageShape, budget: int, device: torch.device | str = "cpu") -> None:
        self.shape, self.device = shape, torch.device(device)
        self.reclaim: Callable[[int], object] | None = None
        self._held = 0
        self._widths: Counter[int] = Counter()
        self._trims = False  # memory is to go back to the system once the budget is met
        self._budget = 0
        self.budget = budget

    @property
    def nbytes(self) -> int:
        """Bytes of all pages that somebody holds."""
        return self._held

    @property
    def pages(self) -> int:
        """Pages that somebody holds."""
        return self._widths.total()

    def widths(self) -> dict[int, int]:
        """How many pages of each width, in bits, somebody holds; from any thread."""
        return {bits: count for bits, count in sorted(self._widths.items()) if count}

    @property
    def budget(self) -> int:
        """Bytes that pages may take.

        It may be set below `nbytes`: what `reclaim` can free goes at once, nothing is given out
        until holders have given back the rest (`-free` bytes), and freed memory goes back to the
        system.
        """
        return self._budget

    @budget.setter
    def budget(self, size: int) -> None:
        if size < 0:
            raise PliantError(f"a budget for pages cannot be negative, as {size} is")
        self._trims = self._trims or size < self._budget
        self._budget = size
        self._reclaim(-self.free)
        self._trim()

    @property
    def free(self) -> int:
        """Bytes left of the budget; below 0 while more is held than a shrunk budget allows."""
        return self._budget - self._held

    def take(self, count: int = 1) -> list[Page]:
        """`count` pages of zeros that are not coded, held once each; all, or OutOfPages."""
        return self.take_coded([self.shape.bits] * count)

    def take_coded(self, bits: Sequence[int]) -> list[Page]:
        """A page for each of `bits`, held once each; all, or OutOfPages."""
        wanted = sum(map(self.shape.nbytes, bits))
        if not wanted:
            return []
        self._reclaim(wanted - self.free)
        if wanted > self.free:
            raise OutOfPages(wanted, self.free)
        try:
            with torch.inference_mode(False):  # pages are written to in and out of that mode
                pages = [Page(self.shape.empty(width, self.device), width) for width in bits]
        except RuntimeError as error:  # the machine has less than the budget says
            raise OutOfPages(
                wanted, self.free, f"the machine has no {format_size(wanted)} for KV pages"
            ) from error
        self._held += wanted
        self._widths.update(bits)
        return pages

    def hold(self, pages: Sequence[Page]) -> None:
        """One more holder for each of `pages`."""
        for page in pages:
            _check_held(page)
            page.holders += 1

    def drop(self, pages: Sequence[Page]) -> None:
        """One holder fewer for each of `pages`; their bytes go with the last."""
        for page in pages:
            _check_held(page)
            page.holders -= 1
            if not page.holders:
                self._held -= page.data.nbytes
                self._widths[page.bits] -= 1
                page.data = page.data.new_empty(0)
        self._trim()

    def writable(self, page: Page) -> bool:
        """Whether its only holder may write to it as it is."""
        return page.holders == 1 and page.bits == self.shape.bits

    def copy(self, page: Page, to: Page) -> None:
        """Write what `page` holds, decoded, to `to`, which must be writable."""
        _check_held(page)
        if not self.writable(to):
            raise PliantError("a shared or coded page cannot be written to")
        to.data.copy_(self.decoded(page))

    def decoded(self, page: Page) -> Tensor:
        """Keys and values [layers, tokens, width] of a page."""
        if page.bits == self.shape.bits:
            return page.data
        return decode(page.data, self.shape, page.bits, self.shape.dtype)

    def recode(self, page: Page, bits: int) -> int:
        """Make a page that is full smaller, for all its holders; returns the bytes it gives back.

        bits: 8, 4, 3 or 2, below what it has.
        """
        _check_held(page)
        self.shape.nbytes(bits)  # refuses widths that there are none of
        if bits >= page.bits:
            raise PliantError(f"a page of {page.bits} bits cannot be made smaller to {bits}")
        before = page.data.nbytes
        with one_thread(), torch.inference_mode(False):
            page.data = encode(self.decoded(page), self.shape, bits)
        self._widths[page.bits] -= 1
        self._widths[bits] += 1
        page.bits = bits
        saved = before - int(page.data.nbytes)
        self._held -= saved
        self._trim()
        return saved

    def _reclaim(self, short: int) -> None:
        if short > 0 and self.reclaim is not None:
            self.reclaim(short)

    def _trim(self) -> None:
        if self._trims and self.free >= 0:
            self._trims = False
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            else:
                release()


def _check_held(page: Page) -> None:
    if page.holders < 1:
        raise PliantError("this page was given back already")
