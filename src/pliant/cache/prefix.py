"""One tree of all full pages, so that requests with a common beginning share its keys and values.

Sources: "BatchLLM: Optimizing Large Batched LLM Inference with Global Prefix Sharing and
Throughput-oriented Token Batching" for one tree over all requests; "RelayAttention for Efficient
Large Language Model Serving with Long System Prompts" for what sharing is worth to attention, which
reads such pages once for a batch (see pliant.cache.paged).

A page is found by the hash of its token ids among the pages that follow its parent, and its token
ids are compared, so that two texts with one hash never meet.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from pliant.cache.pages import Page, PagePool
from pliant.cache.sequence import PagedSequence
from pliant.errors import PliantError

Tokens = tuple[int, ...]


class _Node:
    """A full page after its parent's."""

    __slots__ = ("children", "page", "parent", "tokens")

    def __init__(self, parent: _Node | None, tokens: Tokens, page: Page | None) -> None:
        self.parent, self.tokens, self.page = parent, tokens, page
        self.children: dict[Tokens, _Node] = {}  # hashes the token ids, then compares them


class PrefixTree:
    """Full pages of `pool` by the token ids from the beginning of their text.

    It holds every page in it. Where the pool is short of room, pages that nobody else holds go,
    the least recently used first; a page goes after all that follow it.
    """

    def __init__(self, pool: PagePool) -> None:
        if pool.reclaim is not None:
            raise PliantError("this pool has a prefix tree already")
        self.pool = pool
        self._root = _Node(None, (), None)
        self._used: OrderedDict[_Node, None] = OrderedDict()  # a parent comes after its children
        pool.reclaim = self.evict

    def __len__(self) -> int:
        """Pages in the tree."""
        return len(self._used)

    @property
    def evictable(self) -> int:
        """Bytes that `evict` could free now."""
        return sum(page.data.nbytes for page in self._pages() if page.holders == 1)

    def match(self, tokens: Sequence[int]) -> list[Page]:
        """The longest run of stored full pages that `tokens` begin with; nobody holds it yet."""
        return [node.page for node in self._walk(tokens) if node.page is not None]

    def start(self, tokens: Sequence[int]) -> PagedSequence:
        """A sequence with the longest stored beginning of `tokens`, but for their last at least.

        A model that reads the rest therefore tells what follows.
        """
        path = self._walk(tokens[:-1])
        pages = [node.page for node in path if node.page is not None]
        self._touch(path)
        self.pool.hold(pages)
        return PagedSequence(self.pool, tokens[: len(pages) * self.pool.shape.tokens], pages)

    def insert(self, sequence: PagedSequence) -> int:
        """Store the full pages of `sequence`, of which keys and values are written.

        Where the tree has a page for the same text, uncoded, the sequence reads that one from now
        on and gives up its own. Returns how many pages are new in the tree.
        """
        if sequence.pool is not self.pool:
            raise PliantError("this sequence's pages are of another pool than the tree's")
        size, new, node, path = self.pool.shape.tokens, 0, self._root, []
        for index in range(len(sequence) // size):
            tokens = tuple(sequence.tokens[index * size : (index + 1) * size])
            page = sequence.pages[index]
            child = node.children.get(tokens)
            if child is None:
                child = node.children[tokens] = _Node(node, tokens, page)
                self.pool.hold([page])
                new += 1
            elif child.page is not None and child.page is not page and self._whole(child.page):
                sequence.share(index, child.page)
            path.append(child)
            node = child
        self._touch(path)
        return new

    def evict(self, wanted: int) -> int:
        """Free pages that nobody else holds until `wanted` bytes are; returns the bytes freed."""
        freed = 0
        for node in list(self._used):
            if freed >= wanted:
                break
            page, parent = node.page, node.parent
            assert page is not None
            assert parent is not None
            if page.holders == 1 and not node.children:
                del parent.children[node.tokens], self._used[node]
                freed += page.data.nbytes
                self.pool.drop([page])
        return freed

    def clear(self) -> None:
        """Let go of every page."""
        pages = self._pages()
        self._used.clear()
        self._root.children.clear()
        self.pool.drop(pages)

    def _pages(self) -> list[Page]:
        return [node.page for node in self._used if node.page is not None]

    def _whole(self, page: Page) -> bool:
        return page.bits == self.pool.shape.bits

    def _walk(self, tokens: Sequence[int]) -> list[_Node]:
        size, node, path = self.pool.shape.tokens, self._root, []
        for start in range(0, len(tokens) - size + 1, size):
            found = node.children.get(tuple(tokens[start : start + size]))
            if found is None:
                break
            path.append(found)
            node = found
        return path

    def _touch(self, path: list[_Node]) -> None:
        """Mark as just used, parents last: so they are evicted after their children."""
        for node in reversed(path):
            self._used[node] = None
            self._used.move_to_end(node)
