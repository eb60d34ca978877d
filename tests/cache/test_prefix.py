"""The prefix tree: the same text is stored once, another text never found in its place."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pliant.cache import (
    Chunk,
    OutOfPages,
    PagedModel,
    PagedSequence,
    PagePool,
    PageShape,
    PrefixTree,
)
from pliant.errors import PliantError
from tests.cache.paging import alone, llama, pool_of, random_ids

SHAPE = PageShape(1, 1, 4, 4, tokens=2)
PAGE = SHAPE.nbytes()
MODEL = llama()
PAGED = PagedModel(MODEL)


def stored(tree: PrefixTree, tokens: list[int]) -> PagedSequence:
    """A sequence of `tokens` that the tree has seen."""
    sequence = tree.start(tokens)
    sequence.extend(tokens[len(sequence) :])
    tree.insert(sequence)
    return sequence


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 1), max_size=9), min_size=1, max_size=8))
def test_a_match_is_the_longest_beginning_in_full_pages(texts):
    tree = PrefixTree(PagePool(SHAPE, 1000 * PAGE))
    known = {}
    for text in texts:
        sequence = stored(tree, text)
        for end in range(2, len(text) + 1, 2):
            known.setdefault(tuple(text[:end]), sequence.pages[end // 2 - 1])
    assert len(tree) == len(known)
    for text in texts + [[*text, 1, 0] for text in texts]:
        ends = [end for end in range(2, len(text) + 1, 2) if tuple(text[:end]) in known]
        assert tree.match(text) == [known[tuple(text[:end])] for end in ends]


def test_texts_with_one_hash_do_not_meet():
    twin = 2**61 - 1
    assert hash((5, 0)) == hash((5, twin))
    tree = PrefixTree(PagePool(SHAPE, 9 * PAGE))
    one = stored(tree, [5, 0, 1])
    assert tree.match([5, twin]) == []
    two = stored(tree, [5, twin, 1])
    assert tree.match([5, 0]) == one.pages[:1]
    assert tree.match([5, twin]) == two.pages[:1]
    assert one.pages[0] is not two.pages[0]


def test_at_least_one_token_is_left_to_read():
    tree = PrefixTree(PagePool(SHAPE, 9 * PAGE))
    stored(tree, [1, 2, 3, 4])
    assert len(tree.match([1, 2, 3, 4])) == 2
    assert tree.start([1, 2, 3, 4]).tokens == [1, 2]
    assert tree.start([1, 2, 3, 4, 5]).tokens == [1, 2, 3, 4]
    assert tree.start([]).tokens == []


def test_texts_read_at_the_same_time_end_on_one_page():
    pool = PagePool(SHAPE, 9 * PAGE)
    tree = PrefixTree(pool)
    one, two = PagedSequence(pool), PagedSequence(pool)
    for sequence in (one, two):
        sequence.extend([1, 2, 3, 4, 5])
    assert pool.pages == 6
    assert (tree.insert(one), tree.insert(two), tree.insert(two)) == (2, 0, 0)
    assert pool.pages == 4
    assert two.pages[:2] == one.pages[:2]
    pool.recode(one.pages[0], 2)
    three = PagedSequence(pool)
    three.extend([1, 2])
    tree.insert(three)
    assert three.pages[0].bits == 16  # a coarser page does not take the place of a sequence's own


def test_the_least_recently_used_go_first_and_held_ones_stay():
    pool = PagePool(SHAPE, 6 * PAGE)
    tree = PrefixTree(pool)
    for text in ([1, 1, 2, 2, 0], [1, 1, 3, 3, 0]):
        stored(tree, text).release()
    held = stored(tree, [4, 4, 0])
    tree.start([1, 1, 2, 2, 0]).release()  # used again
    assert (pool.pages, tree.evictable) == (5, 3 * PAGE)
    taken = pool.take(2)
    assert tree.match([1, 1, 3, 3]) == tree.match([1, 1])
    assert len(tree.match([1, 1, 2, 2])) == 2
    taken += pool.take(2)
    assert len(tree) == 1
    assert tree.match([4, 4]) == held.pages[:1]
    with pytest.raises(OutOfPages):
        pool.take()
    held.release()
    pool.take(2)
    assert len(tree) == 0


def test_a_smaller_budget_evicts_at_once():
    pool = PagePool(SHAPE, 8 * PAGE)
    tree = PrefixTree(pool)
    stored(tree, [1, 1, 2, 2, 3, 3]).release()
    pool.budget = 2 * PAGE
    assert (pool.pages, pool.free) == (2, 0)
    assert len(tree.match([1, 1, 2, 2, 3, 3])) == 2
    tree.clear()
    assert (pool.nbytes, len(tree)) == (0, 0)
    assert tree.match([1, 1]) == []


def test_one_tree_a_pool_and_its_own_pages_only():
    pool = PagePool(SHAPE, 8 * PAGE)
    tree = PrefixTree(pool)
    with pytest.raises(PliantError, match="has a prefix tree"):
        PrefixTree(pool)
    with pytest.raises(PliantError, match="another pool"):
        tree.insert(PagedSequence(PagePool(SHAPE, PAGE)))


def test_32_requests_with_a_long_common_prompt():
    """Under 1.3 times the pages of one and the tails, and the logits of requests without sharing.

    A page more each at most: what a tail of 5 tokens has behind it in its last page.
    """
    (common,), tails = random_ids(1024), random_ids(*range(5, 37), seed=1)
    pool = pool_of(MODEL, 16)
    tree = PrefixTree(pool)
    sequences, last = [], []
    for tail in tails:
        prompt = common + tail
        sequence = tree.start(prompt)
        assert len(sequence) == (1024 if sequences else 0)
        last.append(PAGED([Chunk(sequence, prompt[len(sequence) :])])[0])
        tree.insert(sequence)
        sequences.append(sequence)
    one = pool.shape.pages(1024 + len(tails[0]))
    assert pool.pages < 1.3 * one + sum(pool.shape.pages(len(tail)) for tail in tails)
    assert pool.pages == 64 + sum(pool.shape.pages(len(tail)) for tail in tails)
    steps = PAGED([Chunk(sequence, [3]) for sequence in sequences])
    for i in (0, 7, 31):
        own = alone(MODEL, [*common, *tails[i], 3], [1024, len(tails[i]), 1], torch.float32)
        torch.testing.assert_close(last[i], own[-2], atol=1e-4, rtol=0)
        torch.testing.assert_close(steps[i], own[-1], atol=1e-4, rtol=0)
    separate = pool_of(MODEL, 16)
    plain = [PagedSequence(separate) for _ in tails]
    for sequence, tail in zip(plain, tails, strict=True):
        PAGED([Chunk(sequence, common + tail)])
    torch.testing.assert_close(
        PAGED([Chunk(sequence, [3]) for sequence in plain]), steps, atol=1e-4, rtol=0
    )
    for sequence in sequences:
        sequence.release()
    assert pool.nbytes == tree.evictable == len(tree) * pool.shape.nbytes()
