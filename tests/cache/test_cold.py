"""Coding cold pages: which are, in which order, and that it makes the room that it says."""

from __future__ import annotations

import torch

from pliant.cache import PagedSequence, PagePool, PageShape
from pliant.cache.cold import cold_pages, hot_tokens, make_room, room_in

SHAPE = PageShape(2, 2, 8, 8, tokens=4)


def sequence(pool: PagePool, tokens: int) -> PagedSequence:
    made = PagedSequence(pool)
    made.extend(range(tokens))
    for page in made.pages:
        page.data.normal_()
    return made


def bits(made: PagedSequence) -> list[int]:
    return [page.bits for page in made.pages]


def test_the_first_page_the_last_two_and_one_that_is_not_full_stay():
    pool = PagePool(SHAPE, 1 << 20)
    for tokens in range(1, 60):
        made = sequence(pool, tokens)
        cold = list(cold_pages(made))
        assert cold == made.pages[1 : max(tokens // 4 - 2, 1)]
        assert hot_tokens(SHAPE, tokens) == tokens - 4 * len(cold)
        made.release()


def test_all_come_to_a_width_before_any_comes_to_the_next():
    pool = PagePool(SHAPE, 1 << 20)
    first, second = sequence(pool, 24), sequence(pool, 20)  # 3 and 2 cold pages
    saved = SHAPE.nbytes() - SHAPE.nbytes(8)
    assert make_room(pool, [first, second], 4 * saved, (16, 8, 4)) == 4 * saved
    assert (bits(first), bits(second)) == ([16, 8, 8, 8, 16, 16], [16, 8, 16, 16, 16])
    freed = make_room(pool, [first, second], saved + 1, (16, 8, 4))
    assert freed == saved + SHAPE.nbytes(8) - SHAPE.nbytes(4)
    assert (bits(first), bits(second)) == ([16, 4, 8, 8, 16, 16], [16, 8, 8, 16, 16])


def test_what_could_be_freed_is_what_is_freed_and_shared_pages_count_once():
    pool = PagePool(SHAPE, 1 << 20)
    first = sequence(pool, 32)
    second = first.fork()
    could = room_in(pool, [first, second], 2)
    before = pool.nbytes
    assert make_room(pool, [first, second], 1 << 20, (8, 4, 3, 2)) == could == before - pool.nbytes
    assert room_in(pool, [first, second], 2) == 0


def test_time_that_is_over_ends_it():
    pool = PagePool(SHAPE, 1 << 20)
    made = sequence(pool, 400)
    freed = make_room(pool, [made], 1 << 20, (8, 4), seconds=0.0)
    assert freed < room_in(pool, [made], 4)


def test_coded_pages_are_near_what_they_were():
    pool = PagePool(SHAPE, 1 << 20)
    made = sequence(pool, 32)
    was = [page.data.clone().float() for page in made.pages]
    make_room(pool, [made], 1, (8,))
    for page, before in zip(made.pages, was, strict=True):
        torch.testing.assert_close(pool.decoded(page).float(), before, atol=0.04, rtol=0.02)
