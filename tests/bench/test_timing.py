from itertools import count

import pytest
import torch
import torch.nn.functional as F

from pliant.bench import timing
from pliant.bench.samples import COMMON, group_int
from pliant.bench.timing import (
    beyond_cache,
    copies,
    quartile,
    time_calls,
    time_in_step,
    time_product,
)

CPU = torch.device("cpu")


class Clock:
    """A clock that only calls move."""

    def __init__(self, steps):
        self.time, self.steps, self.calls = 0.0, steps, 0

    def __call__(self):
        return self.time

    def call(self, turn):
        assert turn == self.calls
        self.time += self.steps(turn)
        self.calls += 1


def test_it_is_the_lower_quartile_of_the_samples():
    clock = Clock(lambda turn: 5.0 if turn % 3 == 0 else 2.0)
    assert time_calls(clock.call, 100.0, CPU, clock) == 2.0
    assert quartile([4.0, 1.0, 3.0, 2.0, 9.0]) == 2.0


def test_short_calls_are_timed_many_at_once():
    clock = Clock(lambda turn: 1e-6)
    assert time_calls(clock.call, 0.1, CPU, clock) == pytest.approx(1e-6)
    assert clock.calls > 50_000


def test_slow_calls_are_repeated_five_times_and_no_more():
    clock = Clock(lambda turn: 60.0)
    assert time_calls(clock.call, 0.1, CPU, clock) == 60.0
    assert clock.calls == 2 + 5


def test_copies_have_memory_of_their_own():
    code = group_int(64, 128)
    made = copies(code, 5 * code.nbytes - 1)
    assert len(made) == 5
    assert len({c.planes[0].data_ptr() for c in made}) == 5
    assert all(torch.equal(c.decode(), code.decode()) for c in made)
    assert copies(code, 1) == [code]
    assert len(copies(group_int(64, 64), 1 << 30)) == 1024


def test_beyond_the_cache_is_twice_the_largest(monkeypatch, tmp_path):
    for level, size in (("index0", "48K"), ("index3", "32M")):
        (tmp_path / level).mkdir()
        (tmp_path / level / "size").write_text(size + "\n")
    monkeypatch.setattr(timing, "_CACHES", tmp_path)
    assert beyond_cache(CPU) == 64 << 20
    monkeypatch.setattr(timing, "_CACHES", tmp_path / "absent")
    assert beyond_cache(CPU) >= 32 << 20


def test_all_codes_are_met_in_turn(monkeypatch):
    met = []
    monkeypatch.setattr(timing, "matmul", lambda x, code: met.append(code))
    monkeypatch.setattr(timing, "_SAMPLE", 0.0)
    time_product(["a", "b", "c"], torch.zeros(1, 4), 0.0)
    assert met[:6] == ["a", "b", "c", "a", "b", "c"]


def test_a_product_in_a_step_is_one_of_a_longer_call(monkeypatch):
    seen = []
    ticks = count()
    monkeypatch.setattr(timing.cpu, "group_int", lambda x, code: seen.append(code.shape[0]))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(ticks) * 0.0066)
    codes = copies(group_int(64, 64), 1 << 30)[:40]
    time_in_step(codes, torch.zeros(1, 64), 0.0)
    assert seen[0] == 2 * 64
    assert set(seen[1:]) == {3 * 64}  # 3.3 ms each: three fill 10 ms


@pytest.mark.parametrize("name", [n for n in COMMON if n != "bf16" and "rank" not in n])
def test_what_is_timed_in_a_step_is_the_product(name):
    from pliant.codes import RowStack
    from pliant.kernels import cpu
    from pliant.kernels.cpu.build import library

    if library() is None:
        pytest.skip("there is no compiler")
    codes = copies(COMMON[name](96, 128), 1)
    codes += [COMMON[name](32, 128)]
    x = torch.randn(1, 128)
    stack = RowStack(tuple(codes))
    assert torch.allclose(cpu.group_int(x, stack), F.linear(x, stack.decode()), atol=1e-4)
