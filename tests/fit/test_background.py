"""Jobs run in order, one at a time; nothing that they fail with is lost."""

from __future__ import annotations

from collections.abc import Callable
from threading import Event, get_ident

import pytest
import torch

from pliant.errors import PliantError
from pliant.fit.background import Background, ahead

CPU = torch.device("cpu")


def fail() -> None:
    raise PliantError("full")


@pytest.mark.parametrize("threaded", [True, False])
def test_jobs_run_in_order(threaded: bool) -> None:
    done: list[int] = []
    with Background(CPU, threaded) as background:
        for number in range(9):
            background.run(lambda number=number: done.append(number))  # type: ignore[misc]
            assert len(done) >= number, "the one before has ended"
    assert done == list(range(9))


def test_a_job_runs_beside_and_the_next_waits_for_it() -> None:
    go, threads = Event(), set()

    def job() -> None:
        threads.add(get_ident())
        go.wait()

    with Background(CPU, threaded=True) as background:
        background.run(job)
        background.check()
        go.set()
        background.run(job)
    assert len(threads) == 1
    assert get_ident() not in threads


def test_without_a_thread_it_runs_at_once_and_raises_there() -> None:
    with Background(CPU) as background, pytest.raises(PliantError, match="full"):
        background.run(fail)


@pytest.mark.parametrize("where", ["run", "check", "end"])
def test_an_error_is_raised_once_where_it_is_met_first(where: str) -> None:
    met, done = [], []
    try:
        with Background(CPU, threaded=True) as background:
            background.run(fail)
            if where == "run":
                background.run(lambda: done.append(1))
            while where == "check":
                background.check()
    except PliantError as error:
        met.append(str(error))
    assert met == ["full"]
    assert done == [], "a job after one that failed never runs"


def test_an_interruption_waits_for_the_job_under_way() -> None:
    go, done = Event(), []

    def job() -> None:
        go.wait()
        done.append(1)

    with pytest.raises(KeyboardInterrupt):
        _begin_and_raise(job, KeyboardInterrupt, go)
    assert done == [1]


def test_an_error_of_the_caller_is_not_hidden_by_the_jobs() -> None:
    with pytest.raises(ZeroDivisionError):
        _begin_and_raise(fail, ZeroDivisionError, Event())


def _begin_and_raise(job: Callable[[], None], error: type[BaseException], go: Event) -> None:
    with Background(CPU, threaded=True) as background:
        background.run(job)
        go.set()
        raise error


def test_a_call_ahead_runs_beside_and_its_error_waits_for_who_asks() -> None:
    go = Event()
    found = ahead(lambda: go.wait() and get_ident())
    assert not found.done()
    go.set()
    assert found.result() != get_ident()
    with pytest.raises(PliantError, match="full"):
        ahead(fail).result()
