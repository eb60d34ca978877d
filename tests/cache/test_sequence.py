"""A sequence's pages: forks copy only what they write, and a swap brings every bit back."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from pliant.cache import Chunk, OutOfPages, PagedModel, PagedSequence, PagePool, PageShape
from pliant.errors import CorruptError, PliantError
from tests.cache.paging import alone, llama, pool_of, random_ids

SHAPE = PageShape(2, 2, 4, 4, tokens=4)
PAGE = SHAPE.nbytes()
MODEL = llama()
PAGED = PagedModel(MODEL)


def filled(pool: PagePool, tokens: int) -> PagedSequence:
    sequence = PagedSequence(pool)
    sequence.extend(range(tokens))
    for page in sequence.pages:
        page.data.normal_()
    return sequence


def test_forks_share_all_and_copy_the_page_that_they_write():
    pool = PagePool(SHAPE, 8 * PAGE)
    one = filled(pool, 10)
    two = one.fork()
    assert pool.pages == 3
    last = one.pages[2].data.clone()
    two.extend([1])
    assert pool.pages == 4
    assert [a is b for a, b in zip(one.pages, two.pages, strict=True)] == [True, True, False]
    assert torch.equal(two.pages[2].data, last)
    two.pages[2].data.zero_()
    assert torch.equal(one.pages[2].data, last)
    one.extend([1])  # its last page is its own again
    assert pool.pages == 4
    one.release()
    assert pool.pages == 3
    two.release()
    two.release()
    assert pool.nbytes == 0


def test_a_full_last_page_is_not_copied_and_a_coded_one_is():
    pool = PagePool(SHAPE, 8 * PAGE)
    one = filled(pool, 8)
    two = one.fork()
    two.extend([1])
    assert pool.pages == 3
    pool.recode(one.pages[1], 8)
    expected = pool.decoded(one.pages[1]).clone()
    one.truncate(6)
    one.extend([1, 2])
    assert one.pages[1].bits == 16
    assert torch.equal(one.pages[1].data, expected)


def test_a_fork_without_room_to_copy_stays_as_it_was():
    pool = PagePool(SHAPE, 3 * PAGE)
    one = filled(pool, 10)
    two = one.fork()
    with pytest.raises(OutOfPages):
        two.extend([1])
    assert two.tokens == one.tokens
    assert two.pages == one.pages
    assert pool.pages == 3
    one.release()
    two.extend([1])  # now the page is its own


def test_forked_texts_are_each_their_own():
    (common, left, right) = random_ids(10, 5, 7)
    one = PagedSequence(pool_of(MODEL))
    PAGED([Chunk(one, common)])
    two = one.fork()
    found = PAGED([Chunk(one, left), Chunk(two, right)])
    for logits, text in zip(found, (left, right), strict=True):
        own = alone(MODEL, common + text, [10, len(text)], torch.float32)[-1]
        torch.testing.assert_close(logits, own, atol=1e-4, rtol=0)


def test_a_truncated_text_goes_on_as_if_it_had_never_been_longer():
    (common, left, right) = random_ids(10, 9, 7)
    sequence = PagedSequence(pool_of(MODEL))
    PAGED([Chunk(sequence, common + left)])
    sequence.truncate(10)
    assert len(sequence.pages) == 3
    found = PAGED([Chunk(sequence, right)], every=True)
    own = alone(MODEL, common + right, [10, 7], torch.float32)[10:]
    torch.testing.assert_close(found, own, atol=1e-4, rtol=0)
    with pytest.raises(PliantError, match="cannot be cut to 18"):
        sequence.truncate(18)


@pytest.mark.parametrize("where", ["memory", "file"])
def test_a_swap_brings_every_bit_back(where, tmp_path):
    pool = PagePool(SHAPE, 9 * PAGE)
    sequence = filled(pool, 18)
    other = sequence.fork()
    pool.recode(sequence.pages[1], 3)
    pool.recode(sequence.pages[2], 8)
    before = [(page.bits, page.data.clone()) for page in sequence.pages]
    size = pool.nbytes
    with io.BytesIO() if where == "memory" else (tmp_path / "swap").open("w+b") as file:
        assert sequence.swap_out(file) == size == file.tell()
        assert sequence.swapped
        assert pool.nbytes == size  # the fork still holds them
        other.release()
        assert pool.nbytes == 0
        for use in (lambda: sequence.extend([1]), sequence.fork, lambda: sequence.truncate(1)):
            with pytest.raises(PliantError, match="swap it in first"):
                use()
        pool.budget = size - 1
        file.seek(0)
        with pytest.raises(OutOfPages):
            sequence.swap_in(file)
        pool.budget = size
        sequence.swap_in(file)
    assert pool.nbytes == size
    assert sequence.tokens == list(range(18))
    for page, (bits, data) in zip(sequence.pages, before, strict=True):
        assert page.bits == bits
        assert torch.equal(page.data, data)
    with pytest.raises(PliantError, match="was not swapped"):
        sequence.swap_in(io.BytesIO())


def test_a_swapped_text_goes_on_with_the_same_logits():
    (ids,) = random_ids(14)
    pool = pool_of(MODEL, dtype=torch.bfloat16)
    one, two = PagedSequence(pool), PagedSequence(pool)
    for sequence in (one, two):
        PAGED([Chunk(sequence, ids)])
    file = io.BytesIO()
    one.swap_out(file)
    file.seek(0)
    one.swap_in(file)
    assert torch.equal(PAGED([Chunk(one, [3, 4])]), PAGED([Chunk(two, [3, 4])]))


def test_a_damaged_or_short_swap_file_is_refused():
    pool = PagePool(SHAPE, 8 * PAGE)
    sequence, file = filled(pool, 8), io.BytesIO()
    sequence.swap_out(file)
    content = bytearray(file.getvalue())
    content[5] ^= 1
    for bad in (content, file.getvalue()[:-1], b""):
        with pytest.raises(CorruptError, match="swap file"):
            sequence.swap_in(io.BytesIO(bad))
        assert sequence.swapped
        assert pool.nbytes == 0
    sequence.swap_in(io.BytesIO(file.getvalue()))
    sequence.release()


def test_a_full_disk_leaves_the_sequence_as_it_was():
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("there is no /dev/full")
    pool = PagePool(SHAPE, 8 * PAGE)
    sequence = filled(pool, 8)
    before = [page.data.clone() for page in sequence.pages]
    file = full.open("wb", buffering=0)
    with file, pytest.raises(PliantError, match="cannot swap 8 tokens out"):
        sequence.swap_out(file)
    assert not sequence.swapped
    assert all(torch.equal(a, p.data) for a, p in zip(before, sequence.pages, strict=True))
    sequence.extend([1])


def test_it_starts_with_full_pages_only():
    pool = PagePool(SHAPE, 8 * PAGE)
    with pytest.raises(PliantError, match="hold 4 tokens, not 3"):
        PagedSequence(pool, [1, 2, 3], pool.take())
