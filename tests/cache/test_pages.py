"""The pool counts what is held, gives out no more than its budget, and takes pages back."""

from __future__ import annotations

import io

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

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


class Paging(RuleBasedStateMachine):
    """Random operations beside a model: each sequence is the list of its tokens' contents."""

    @initialize(pages=st.integers(4, 24))
    def begin(self, pages):
        self.pool = PagePool(SHAPE, pages * PAGE)
        self.tree = PrefixTree(self.pool)
        self.sequences: list[PagedSequence] = []
        self.tokens: list[list[int]] = []  # what the sequences should be
        self.files: dict[int, io.BytesIO] = {}

    def pick(self, data, swapped=False):
        some = [i for i, s in enumerate(self.sequences) if s.swapped == swapped]
        return data.draw(st.sampled_from(some)) if some else None

    @rule(tokens=st.lists(st.integers(0, 2), max_size=18))
    def start(self, tokens):
        sequence = self.tree.start(tokens)
        assert len(sequence) <= max(len(tokens) - 1, 0)
        assert sequence.tokens == tokens[: len(sequence)]
        self.sequences.append(sequence)
        self.tokens.append(sequence.tokens.copy())

    @rule(data=st.data(), tokens=st.lists(st.integers(0, 2), max_size=9))
    def extend(self, data, tokens):
        if (i := self.pick(data)) is None:
            return
        sequence, start = self.sequences[i], len(self.tokens[i])
        try:
            sequence.extend(tokens)
        except OutOfPages:
            return
        self.tokens[i] += tokens
        for number, (page, first, last) in enumerate(sequence.spans(start)):
            assert self.pool.writable(page)
            at = start + sum(b - a for _, a, b in list(sequence.spans(start))[:number])
            for slot in range(first, last):
                page.data[:, slot] = contents(self.tokens[i], at + slot - first)

    @rule(data=st.data())
    def fork(self, data):
        if (i := self.pick(data)) is not None:
            self.sequences.append(self.sequences[i].fork())
            self.tokens.append(self.tokens[i].copy())

    @rule(data=st.data())
    def truncate(self, data):
        if (i := self.pick(data)) is not None:
            length = data.draw(st.integers(0, len(self.tokens[i])))
            self.sequences[i].truncate(length)
            del self.tokens[i][length:]

    @rule(data=st.data())
    def insert(self, data):
        if (i := self.pick(data)) is not None:
            self.tree.insert(self.sequences[i])

    @rule(data=st.data())
    def swap_out(self, data):
        if (i := self.pick(data)) is not None:
            file = self.files[id(self.sequences[i])] = io.BytesIO()
            self.sequences[i].swap_out(file)

    @rule(data=st.data())
    def swap_in(self, data):
        if (i := self.pick(data, swapped=True)) is not None:
            file = self.files[id(self.sequences[i])]
            file.seek(0)
            try:
                self.sequences[i].swap_in(file)
            except OutOfPages:
                assert self.sequences[i].swapped

    @rule(data=st.data())
    def release(self, data):
        if self.sequences:
            i = data.draw(st.integers(0, len(self.sequences) - 1))
            self.sequences.pop(i).release()
            self.tokens.pop(i)

    @rule(pages=st.integers(0, 24))
    def budget(self, pages):
        self.pool.budget = pages * PAGE

    @precondition(lambda self: self.pool.pages)
    @rule(data=st.data())
    def recode(self, data):
        full = [p for s in self.sequences for p in s.pages[: len(s) // 4] if p.bits == 16]
        if full:
            page = data.draw(st.sampled_from(full))
            self.pool.recode(page, 8)

    @invariant()
    def counts_are_right(self):
        held = [page for s in self.sequences for page in s.pages]
        held += self.tree._pages()
        distinct = {id(page): page for page in held}
        assert self.pool.pages == len(distinct)
        assert self.pool.nbytes == sum(page.data.nbytes for page in distinct.values())
        for page in distinct.values():
            assert page.holders == sum(other is page for other in held)
            assert page.data.nbytes == SHAPE.nbytes(page.bits)

    @invariant()
    def contents_are_right(self):
        for sequence, tokens in zip(self.sequences, self.tokens, strict=True):
            assert sequence.tokens == tokens
            if sequence.swapped:
                assert not sequence.pages
                continue
            at = 0
            for page, first, last in sequence.spans(0):
                found = self.pool.decoded(page)[:, first:last]
                wanted = torch.stack([contents(tokens, at + k) for k in range(last - first)], 1)
                torch.testing.assert_close(found, wanted, atol=0.1, rtol=0.02)
                at += last - first


def contents(tokens: list[int], at: int) -> torch.Tensor:
    """Stand-ins [layers, width] for the keys and values of a token: they depend on all before."""
    number = hash(tuple(tokens[: at + 1])) % 1009
    generator = torch.Generator().manual_seed(number)
    return torch.randn(SHAPE.layers, SHAPE.width, generator=generator).bfloat16()


TestPaging = Paging.TestCase
TestPaging.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
