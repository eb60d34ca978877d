"""The pages of one request: grow, fork, cut back, swap out and in."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import torch

from pliant.cache.pages import Page, PagePool
from pliant.errors import CorruptError, PliantError


class PagedSequence:
    """Token ids, and the pages that hold their keys and values in order.

    tokens, pages: what it starts with: full pages, held for it already, and their token ids.
    """

    def __init__(
        self, pool: PagePool, tokens: Sequence[int] = (), pages: Sequence[Page] = ()
    ) -> None:
        if len(tokens) != len(pages) * pool.shape.tokens:
            raise PliantError(
                f"{len(pages)} full pages hold {len(pages) * pool.shape.tokens} tokens, not "
                f"{len(tokens)}"
            )
        self.pool = pool
        self.tokens = list(tokens)
        self.pages = list(pages)
        self._swapped: tuple[list[int], int] | None = None  # bits of its pages, checksum

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def swapped(self) -> bool:
        """Whether its keys and values are in a file."""
        return self._swapped is not None

    def extend(self, tokens: Sequence[int]) -> None:
        """Make room for `tokens`, of which keys and values are to be written; all, or OutOfPages.

        A last page that is shared or coded, and not full, is copied first.
        """
        self._check_here()
        if not tokens:
            return
        copies = self._copies()
        taken = self.pool.take(self._more(len(tokens)) + copies)
        if copies:
            last, own = self.pages[-1], taken.pop()
            self.pool.copy(last, own)
            self.pages[-1] = own
            self.pool.drop([last])
        self.pages += taken
        self.tokens += tokens

    def wants(self, tokens: int) -> int:
        """Bytes of pages that it takes to extend it by so many."""
        count = self._more(tokens) + self._copies() if tokens else 0
        return count * self.pool.shape.nbytes()

    def _more(self, tokens: int) -> int:
        """New pages for so many more tokens."""
        return self.pool.shape.pages(len(self) + tokens) - len(self.pages)

    def _copies(self) -> bool:
        """Whether the last page is not full, and not to be written to as it is."""
        part = len(self) % self.pool.shape.tokens
        return bool(part) and not self.pool.writable(self.pages[-1])

    def spans(self, start: int, stop: int | None = None) -> Iterator[tuple[Page, int, int]]:
        """Pages of the tokens from `start` to `stop` (or the end), and which of each they are."""
        size, stop = self.pool.shape.tokens, len(self) if stop is None else stop
        while start < stop:
            index, first = divmod(start, size)
            last = min(size, first + stop - start)
            yield self.pages[index], first, last
            start += last - first

    def fork(self) -> PagedSequence:
        """Another sequence with the same tokens on the same pages; the first to write copies."""
        self._check_here()
        other = PagedSequence(self.pool)
        self.pool.hold(self.pages)
        other.tokens, other.pages = self.tokens.copy(), self.pages.copy()
        return other

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self._check_here()
        if not 0 <= length <= len(self):
            raise PliantError(f"a sequence of {len(self)} tokens cannot be cut to {length}")
        kept = self.pool.shape.pages(length)
        gone, self.pages = self.pages[kept:], self.pages[:kept]
        del self.tokens[length:]
        self.pool.drop(gone)

    def share(self, index: int, page: Page) -> None:
        """Read page `index` from `page`, which holds the same tokens, and give up the own one."""
        self._check_here()
        self.pool.hold([page])
        self.pool.drop([self.pages[index]])
        self.pages[index] = page

    def swap_out(self, file: BinaryIO) -> int:
        """Write its pages as they are to `file` and give them back; returns the bytes written.

        Pages that others hold stay theirs. PliantError where the file cannot be written; the
        sequence is then as before.
        """
        self._check_here()
        checksum, size = 0, 0
        try:
            for page in self.pages:
                content = _bytes(page)
                file.write(content)
                checksum, size = zlib.crc32(content, checksum), size + len(content)
            file.flush()
        except OSError as error:
            raise PliantError(f"cannot swap {len(self)} tokens out: {error}") from error
        self._swapped = [page.bits for page in self.pages], checksum
        gone, self.pages = self.pages, []
        self.pool.drop(gone)
        return size

    def swap_in(self, file: BinaryIO) -> None:
        """Read back what `swap_out` wrote, from where `file` stands, to pages of its own.

        OutOfPages where there is no room; CorruptError where the file holds something else. The
        sequence then stays swapped out.
        """
        if self._swapped is None:
            raise PliantError("this sequence was not swapped out")
        bits, expected = self._swapped
        pages = self.pool.take_coded(bits)
        try:
            checksum = 0
            for page in pages:
                content = _read(file, page.data.nbytes)
                checksum = zlib.crc32(content, checksum)
                values = torch.frombuffer(content, dtype=page.data.dtype)
                page.data.copy_(values.view(page.data.shape))
            if checksum != expected:
                raise CorruptError("the swap file is not what was written to it")
        except BaseException:
            self.pool.drop(pages)
            raise
        self.pages, self._swapped = pages, None

    def release(self) -> None:
        """Give all pages back; what is left is an empty sequence."""
        gone, self.pages, self.tokens, self._swapped = self.pages, [], [], None
        self.pool.drop(gone)

    def _check_here(self) -> None:
        if self._swapped is not None:
            raise PliantError("this sequence is swapped out; swap it in first")


def _bytes(page: Page) -> memoryview:
    content: Any = page.data.cpu().view(torch.uint8).flatten().numpy()
    return memoryview(content)


def _read(file: BinaryIO, size: int) -> bytearray:
    content = bytearray(file.read(size))
    if len(content) != size:
        raise CorruptError(f"the swap file ends {size - len(content)} bytes early")
    return content
