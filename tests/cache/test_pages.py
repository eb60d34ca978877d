"""The pool counts what is held, gives out no more than its budget, and takes pages back."""

from __future__ import annotations

import io
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pliant.cache import OutOfPages, PagedSequence, PagePool, PageShape, PrefixTree
from pliant.errors import PliantError

SHAPE = PageShape(2, 2, 4, 4, tokens=4)
PAGE = SHAPE.nbytes()


def test_the_budget_holds_to_the_byte():
    pool = PagePool(SHAPE, 3 * PAGE - 1)
    pages = pool.take(2)
    assert pool.nbytes == 2 * PAGE == sum(page.data.nbytes for page in pages)
    with pytest.raises(OutOfPages) as refused:
        pool.take()
    assert (refused.value.wanted, refused.value.free) == (PAGE, PAGE - 1)
    pool.budget = 4 * PAGE
    with pytest.raises(OutOfPages):
        pool.take(3)
    assert (pool.nbytes, pool.pages) == (2 * PAGE, 2)  # all or nothing
    pool.take(2)
    assert pool.free == 0


def test_shrinking_below_what_is_held_gives_out_nothing_until_it_fits():
    pool = PagePool(SHAPE, 4 * PAGE)
    pages = pool.take(4)
    pool.budget = 2 * PAGE
    assert pool.free == -2 * PAGE
    pool.drop(pages[:2])
    assert pool.free == 0
    with pytest.raises(OutOfPages):
        pool.take()
    saved = pool.recode(pages[2], 2)
    assert saved == PAGE - SHAPE.nbytes(2) == pool.free
    pool.drop(pages[2:])
    assert (pool.nbytes, pool.pages) == (0, 0)


def test_memory_goes_back_to_the_system_once_a_shrink_is_met(monkeypatch):
    calls = []
    monkeypatch.setattr("pliant.cache.pages.release", lambda: calls.append(pool.nbytes))
    pool = PagePool(SHAPE, 4 * PAGE)
    pages = pool.take(3)
    pool.drop(pages[:1])
    assert calls == []  # the next page can have it
    pool.budget = PAGE
    assert calls == []
    pool.drop(pages[1:])
    assert calls == [0]
    pool.budget = PAGE // 2
    assert calls == [0, 0]


def test_a_shrunk_page_is_smaller_for_all_its_holders():
    pool = PagePool(SHAPE, 4 * PAGE)
    first = PagedSequence(pool)
    first.extend(range(8))
    for page in first.pages:
        page.data.normal_()
    second = first.fork()
    page, before = first.pages[0], first.pages[0].data.clone()
    pool.recode(page, 8)
    assert second.pages[0] is page
    assert page.bits == 8
    assert pool.nbytes == PAGE + SHAPE.nbytes(8)
    torch.testing.assert_close(pool.decoded(page), before, atol=0.03, rtol=0.01)
    for bits in (16, 8):
        with pytest.raises(PliantError, match=r"cannot be made smaller|not 16"):
            pool.recode(page, bits)
    assert pool.recode(page, 3) == SHAPE.nbytes(8) - SHAPE.nbytes(3)


def test_a_page_given_back_is_not_used_again():
    pool = PagePool(SHAPE, 4 * PAGE)
    (page,) = pool.take()
    pool.drop([page])
    for use in (pool.drop, pool.hold):
        with pytest.raises(PliantError, match="given back"):
            use([page])
    with pytest.raises(PliantError, match="given back"):
        pool.recode(page, 8)
    with pytest.raises(PliantError, match="negative"):
        pool.budget = -1


def test_a_machine_without_memory_is_out_of_pages(monkeypatch):
    pool = PagePool(SHAPE, 4 * PAGE)

    def fails(*_):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(PageShape, "empty", fails)
    with pytest.raises(OutOfPages, match="machine"):
        pool.take()
    assert pool.nbytes == 0


SMALL = PageShape(1, 1, 8, 8, tokens=2)


class Paging:
    """Operations of a server, each beside what the sequences should be: lists of token ids."""

    def __init__(self, pages: int) -> None:
        self.pool = PagePool(SMALL, pages * SMALL.nbytes())
        self.tree = PrefixTree(self.pool)
        self.sequences: list[PagedSequence] = []
        self.tokens: list[list[int]] = []
        self.files: dict[int, io.BytesIO] = {}

    def pick(self, random: Random, swapped: bool = False) -> int | None:
        some = [i for i, s in enumerate(self.sequences) if s.swapped == swapped]
        return random.choice(some) if some else None

    def start(self, random: Random) -> None:
        tokens = random.choices([0, 1], k=random.randrange(9))
        sequence = self.tree.start(tokens)
        assert len(sequence) <= max(len(tokens) - 1, 0)
        assert sequence.tokens == tokens[: len(sequence)]
        self.sequences.append(sequence)
        self.tokens.append(sequence.tokens.copy())

    def extend(self, random: Random) -> None:
        if (i := self.pick(random)) is None:
            return
        sequence, start = self.sequences[i], len(self.tokens[i])
        tokens = random.choices([0, 1], k=random.randrange(1, 7))
        try:
            sequence.extend(tokens)
        except OutOfPages:
            return
        self.tokens[i] += tokens
        at = start
        for page, first, last in sequence.spans(start):
            assert self.pool.writable(page)
            for slot in range(first, last):
                page.data[:, slot] = contents(self.tokens[i], at)
                at += 1
        assert at == len(self.tokens[i])

    def fork(self, random: Random) -> None:
        if (i := self.pick(random)) is not None:
            self.sequences.append(self.sequences[i].fork())
            self.tokens.append(self.tokens[i].copy())

    def truncate(self, random: Random) -> None:
        if (i := self.pick(random)) is not None:
            length = random.randint(0, len(self.tokens[i]))
            self.sequences[i].truncate(length)
            del self.tokens[i][length:]

    def insert(self, random: Random) -> None:
        if (i := self.pick(random)) is not None:
            self.tree.insert(self.sequences[i])

    def swap_out(self, random: Random) -> None:
        if (i := self.pick(random)) is not None:
            file = self.files[id(self.sequences[i])] = io.BytesIO()
            self.sequences[i].swap_out(file)

    def swap_in(self, random: Random) -> None:
        if (i := self.pick(random, swapped=True)) is not None:
            file = self.files[id(self.sequences[i])]
            file.seek(0)
            try:
                self.sequences[i].swap_in(file)
            except OutOfPages:
                assert self.sequences[i].swapped

    def release(self, random: Random) -> None:
        if self.sequences:
            i = random.randrange(len(self.sequences))
            self.sequences.pop(i).release()
            self.tokens.pop(i)

    def budget(self, random: Random) -> None:
        self.pool.budget = random.choice([0, 6, 12, 24]) * SMALL.nbytes()

    def recode(self, random: Random) -> None:
        full = [p for s in self.sequences for p in s.pages[: len(s) // SMALL.tokens]]
        full = [page for page in full if page.bits == 16]
        if full:
            self.pool.recode(random.choice(full), 8)

    def check(self) -> None:
        self.check_counts()
        for sequence, tokens in zip(self.sequences, self.tokens, strict=True):
            self.check_contents(sequence, tokens)

    def check_counts(self) -> None:
        held = [page for s in self.sequences for page in s.pages]
        held += [node.page for node in self.tree._used]
        distinct = {id(page): page for page in held}
        assert self.pool.pages == len(distinct)
        assert self.pool.nbytes == sum(page.data.nbytes for page in distinct.values())
        for page in distinct.values():
            assert page.holders == sum(other is page for other in held)
            assert page.data.nbytes == SMALL.nbytes(page.bits)

    def check_contents(self, sequence: PagedSequence, tokens: list[int]) -> None:
        assert sequence.tokens == tokens
        if sequence.swapped:
            assert not sequence.pages
            return
        at = 0
        for page, first, last in sequence.spans(0):
            found = self.pool.decoded(page)[:, first:last]
            wanted = torch.stack([contents(tokens, at + k) for k in range(last - first)], 1)
            torch.testing.assert_close(found, wanted, atol=0.1, rtol=0.02)
            at += last - first


def contents(tokens: list[int], at: int) -> torch.Tensor:
    """Stand-ins [layers, width] for the keys and values of a token: they depend on all before."""
    generator = torch.Generator().manual_seed(hash(tuple(tokens[: at + 1])) % 1009)
    return torch.randn(SMALL.layers, SMALL.width, generator=generator).bfloat16()


OPERATIONS = [
    "start", "start", "extend", "extend", "extend", "fork", "truncate", "insert", "insert",
    "swap_out", "swap_in", "release", "release", "budget", "recode",
]  # fmt: skip
steps = st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 2**16))


@settings(max_examples=60, deadline=None)
@given(st.integers(4, 24), st.lists(steps, min_size=30, max_size=50))
def test_random_operations_keep_counts_bytes_and_contents(pages, operations):
    paging = Paging(pages)
    for name, seed in operations:
        getattr(paging, name)(Random(seed))
        paging.check()
    evictable, before = paging.tree.evictable, paging.pool.nbytes
    assert paging.tree.evict(before) == evictable == before - paging.pool.nbytes
    paging.check()
    for sequence in paging.sequences:
        sequence.release()
    assert paging.pool.nbytes == paging.tree.evictable
    paging.pool.budget = 0
    assert paging.pool.pages == len(paging.tree) == 0
