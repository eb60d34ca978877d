"""What all engines share: the queue's order, the rate, events across threads."""

from __future__ import annotations

import asyncio
import threading

import pytest

from pliant.serve.engine import Answer, FairQueue, QueueFullError, Rate
from pliant.serve.request import Finished, Live, Piece, Request

from ..run.tiny import ByteTokenizer


def answer(priority: int = 0, cancel=lambda answer: None) -> Answer:
    request = Request((5,), 4, priority=priority)
    return Answer(Live(request, ByteTokenizer(), frozenset()), cancel)


def test_priority_goes_before_arrival():
    async def order():
        queue = FairQueue(9)
        for priority in (1, 0, 1, -1, 0):
            queue.push(answer(priority))
        entries = [queue.pop() for _ in range(len(queue))]
        return [entry.live.request.priority for entry in entries]

    assert asyncio.run(order()) == [-1, 0, 0, 1, 1]


def test_equals_come_out_as_they_went_in():
    async def check():
        queue, given = FairQueue(9), [answer() for _ in range(5)]
        for one in given:
            queue.push(one)
        assert queue.remove(given[1])
        assert not queue.remove(given[1])
        assert [queue.pop() for _ in range(len(queue))] == [given[i] for i in (0, 2, 3, 4)]

    asyncio.run(check())


def test_a_full_queue_refuses():
    async def check():
        queue = FairQueue(1)
        queue.push(answer())
        with pytest.raises(QueueFullError, match="1 requests wait"):
            queue.push(answer())
        assert len(queue) == 1

    asyncio.run(check())


def test_events_of_another_thread_arrive_in_order_and_end():
    async def read():
        one = answer()
        events = [*(Piece(str(i)) for i in range(50)), Finished("stop")]
        thread = threading.Thread(target=lambda: [one.put(event) for event in events])
        thread.start()
        found = [event async for event in one]
        thread.join()
        assert found == events
        assert [event async for event in one] == []
        return one

    gone = asyncio.run(read())
    gone.put(Piece("nobody listens"))  # its loop is closed


def test_cancelling_twice_is_cancelling_once():
    async def check():
        calls = []
        one = answer(cancel=calls.append)
        one.cancel()
        one.cancel()
        assert calls == [one]
        assert one.cancelled

    asyncio.run(check())


def test_a_rate_is_of_the_last_seconds():
    now = 0.0
    rate = Rate(lambda: now)
    assert rate.value() == 0
    for now in range(10):  # noqa: B007
        rate.count()
    assert rate.value() == 6 / 5  # 4 to 9
    now = 100
    assert rate.value() == 0
