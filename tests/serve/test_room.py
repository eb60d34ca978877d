"""The engine under changing budgets and loads: inside them, no request lost, answers unharmed."""

from __future__ import annotations

import asyncio
import random

import pytest

from pliant.errors import BudgetError, CorruptError
from pliant.kernels.cpu import multiplies_words
from pliant.ladder.cache_record import CacheRecord, write_record
from pliant.ladder.live import LiveModel
from pliant.run import load
from pliant.serve.batching import BatchingEngine
from pliant.serve.request import Request

from .test_batching import assert_same, engine_of, requests, said

CONTEXT = 500
DAMAGES = {8: 0.0001, 4: 0.001, 3: 0.003, 2: 0.01}


@pytest.fixture(scope="module")
def measured(artifact, tmp_path_factory):
    """The tiny artifact with a record of its cache's damage."""
    import shutil

    copy = tmp_path_factory.mktemp("room") / "tiny"
    shutil.copytree(artifact, copy)
    record = CacheRecord(damage=DAMAGES, text="none", tokens=1, window=1)
    write_record(copy, record)
    return copy


def opened(measured, weights: int = 190_000):
    return load(measured, weights=weights, context=CONTEXT, batch=1)


def words(count: int, seed: int = 0) -> tuple[int, ...]:
    """Token ids that do not end an answer."""
    chooser = random.Random(seed)
    return tuple(chooser.randrange(10, 200) for _ in range(count))


def watched(engine, seen: list[int]) -> None:
    """Note after every turn how far what is held is above the budget."""
    turn = engine._turn

    def watching():
        turn()
        seen.append(engine.room.held - engine.room.memory)

    engine._turn = watching


def test_many_requests_take_memory_from_the_weights_and_give_it_back(measured):
    async def ask():
        async with engine_of(opened(measured), fixed=False, most=8) as engine:
            engine.room.governor.calm = 0.2
            memory = engine.room.reserved + 190_000 + 40 * engine.room.shape.nbytes()
            await engine.set_budget(memory)
            before = engine.status()
            asked = [Request(words(300, i), 40) for i in range(8)]
            answers = [engine.submit(request) for request in asked]
            seen: list[int] = []
            watched(engine, seen)
            sizes = []
            ends = asyncio.gather(*(said(answer) for answer in answers))
            while not ends.done():
                sizes.append((engine.status().weights, engine.status().running))
                await asyncio.sleep(0.002)
            ends = await ends
            for _ in range(200):
                await asyncio.sleep(0.02)
                if engine.status().weights == before.weights:
                    break
            return before, sizes, ends, engine.status(), seen, engine.decisions()

    before, sizes, ends, after, seen, decisions = asyncio.run(ask())
    assert all(end.reason == "length" for _, end in ends)
    assert max(running for _, running in sizes) > 2
    assert min(weights for weights, _ in sizes) < before.weights == after.weights
    assert max(seen) <= 0
    assert any("weights from" in decision.what for decision in decisions)
    assert all(decision.reason for decision in decisions)


def test_lower_budgets_code_pages_and_lose_no_request(measured):
    async def ask():
        async with engine_of(opened(measured), fixed=False, most=8) as engine:
            room, page = engine.room, engine.room.shape.nbytes()
            await engine.set_budget(room.reserved + 190_000 + 300 * page)
            asked = [Request(words(150, i), 60) for i in range(8)]
            answers = [engine.submit(request) for request in asked]
            chooser, widths = random.Random(1), set()
            ends = asyncio.gather(*(said(answer) for answer in answers))
            while not ends.done():
                size = room.reserved + room.plan.smallest + page * chooser.randrange(40, 120)
                status = await engine.set_budget(max(size, room.least))
                assert status.weights + status.cache + status.activations <= status.memory
                widths |= status.pages.keys()
            return await ends, widths, engine.pool

    ends, widths, pool = asyncio.run(ask())
    assert [end.reason for _, end in ends] == ["length"] * 8
    assert [end.new_tokens for _, end in ends] == [60] * 8
    assert min(widths) < 16
    assert pool.nbytes == sum(pool.shape.nbytes(bits) * count
                              for bits, count in pool.widths().items())  # fmt: skip


@pytest.mark.parametrize("swapping", [False, True])
def test_answers_that_were_not_resized_are_those_of_requests_alone(artifact, tmp_path, swapping):
    model = opened(artifact, 120_000)  # no page is coded: its cache was not measured
    asked = [Request(words(40, i), 80, logprobs=0) for i in range(8)]

    async def ask(together, pages=None, **options):
        async with engine_of(model, pages, **options) as engine:
            if together:
                answers = [engine.submit(request) for request in asked]
                return await asyncio.gather(*map(said, answers)), engine.decisions()
            return [await said(engine.submit(request)) for request in asked], []

    alone, _ = asyncio.run(ask(False))
    swap = tmp_path if swapping else None
    found, decisions = asyncio.run(ask(True, 20, swap=swap))
    gave_way = [d.what for d in decisions if "request" in d.what]
    assert gave_way
    assert any("swapped out" in what for what in gave_way) == swapping
    assert not list(tmp_path.iterdir())
    assert not any(end.resized for _, end in found)
    if multiplies_words():  # each token by itself, to the last bit
        assert [tokens for tokens, _ in found] == [tokens for tokens, _ in alone]
    assert_same(found, alone)


def test_a_full_disk_makes_a_request_read_again(artifact, tmp_path, monkeypatch):
    def full(self, file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pliant.cache.sequence.PagedSequence.swap_out", full)
    asked = requests(8, seed=3)

    async def ask():
        async with engine_of(opened(artifact, 120_000), 20, swap=tmp_path) as engine:
            answers = [engine.submit(request) for request in asked]
            return await asyncio.gather(*map(said, answers)), engine.decisions()

    ends, decisions = asyncio.run(ask())
    assert all(end.reason in ("length", "stop") for _, end in ends)
    assert any("No space left" in decision.what for decision in decisions)


def test_a_rung_that_cannot_be_read_leaves_the_server_running(measured, monkeypatch):
    async def ask():
        async with engine_of(opened(measured), fixed=False) as engine:

            def broken(self, target, index, room):
                raise CorruptError("a shard is damaged")

            monkeypatch.setattr(LiveModel, "_replace", broken)
            room = engine.room
            answer = engine.submit(Request(words(95), 30))
            small = room.reserved + 100_000 + 30 * room.shape.nbytes()
            change = asyncio.create_task(engine.set_budget(small))
            _, end = await said(answer)
            monkeypatch.undo()
            await engine.set_budget(small)
            await asyncio.wait_for(change, 5)
            return end, engine.decisions(), engine.status()

    end, decisions, status = asyncio.run(ask())
    assert end.reason in ("length", "stop", "error")
    assert any("damaged" in decision.reason for decision in decisions)
    assert status.weights + status.cache + status.activations <= status.memory


def test_a_budget_for_no_request_is_refused_and_changes_nothing(measured):
    async def ask():
        async with engine_of(opened(measured), fixed=False) as engine:
            before = engine.status()
            with pytest.raises(BudgetError, match="smallest weights"):
                await engine.set_budget(engine.room.least - 1)
            after = await engine.set_budget(engine.room.least)
            _, end = await said(engine.submit(Request(tuple([9] * (CONTEXT - 20)), 20)))
            return before, after, end

    before, after, end = asyncio.run(ask())
    assert before.memory != after.memory
    assert (end.reason, end.new_tokens) == ("length", 20)


def test_fixed_weights_stay(measured):
    async def ask():
        async with engine_of(opened(measured, 120_000), fixed=True, most=4) as engine:
            room = engine.room
            weights = engine.status().weights
            answers = [engine.submit(Request(words(200), 20)) for _ in range(6)]
            await engine.set_budget(room.least)
            ends = [await said(answer) for answer in answers]
            return weights, engine.status(), ends

    weights, status, ends = asyncio.run(ask())
    assert status.weights == weights
    assert [end.new_tokens for _, end in ends] == [20] * 6


def test_swap_needs_a_directory(measured, tmp_path):
    from pliant.serve.opening import open_engine

    with pytest.raises(Exception, match="no directory"):
        open_engine(measured, swap=tmp_path / "none")
    assert BatchingEngine is not None
