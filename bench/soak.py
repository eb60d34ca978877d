"""A long run of `pliant serve`'s engine under random load and changing budgets.

    python bench/soak.py ARTIFACT [--minutes 20] [--changes 40] [--low 110MiB] [--high 400MiB]
                         [--swap DIR] [--seed 0]

Requests arrive at random, in bursts and lulls, with random prompts and lengths; one in eight is
cancelled on its way, one in four is sampled, the others are greedy. The budget changes --changes
times. After every step of the engine what is held (weights and pages, counted by the engine, and
every 50th time from the tensors themselves) is compared with the budget in force: above it counts
only as long as a lowered budget may take, a second. Afterwards every greedy answer that says it was
not resized is asked for again, alone, with the very same rungs, and compared token for token.

Writes bench/results/soak.{json,md}; exit status 1 when anything was above the budget, lost or
different.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import random
import statistics
import sys
import time
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import torch

from pliant.budget import format_size, parse_size
from pliant.ladder.live import LiveModel
from pliant.model import code_of, swap
from pliant.run import Sampler
from pliant.serve.opening import open_engine
from pliant.serve.request import Finished, Piece, Request

RESULTS = Path(__file__).parent / "results"
GRACE_SECONDS = 1.0
CONTEXT = 1024


@dataclass
class Watch:
    """What every step showed."""

    engine: Any
    steps: int = 0
    worst_over: int = 0  # bytes above a budget that was not lowered within the last second
    slowest_shrink: float = 0.0  # seconds until a lowered budget held
    miscounted: int = 0
    seconds: list[float] = field(default_factory=list)
    peak_rss: int = 0
    lowered_at: float | None = None

    def attach(self) -> None:
        turn = self.engine._turn
        process = psutil.Process()

        def watching() -> None:
            began = time.monotonic()
            turn()
            self.seconds.append(time.monotonic() - began)
            self.steps += 1
            self._check()
            if self.steps % 50 == 0:
                self.miscounted += abs(tensors(self.engine) - held(self.engine))
                self.peak_rss = max(self.peak_rss, process.memory_info().rss)

        self.engine._turn = watching

    def _check(self) -> None:
        over = held(self.engine) + self.engine.room.reserved - self.engine.room.memory
        now = time.monotonic()
        if self.lowered_at is not None:
            if over <= 0:
                self.slowest_shrink = max(self.slowest_shrink, now - self.lowered_at)
                self.lowered_at = None
            elif now - self.lowered_at < GRACE_SECONDS:
                return
        self.worst_over = max(self.worst_over, over)


def held(engine: Any) -> int:
    """Weights and pages as the engine counts them."""
    return int(engine.room.weights + engine.pool.nbytes)


def tensors(engine: Any) -> int:
    """The same, from the tensors."""
    model = engine._model
    codes = sum(code_of(model, target).nbytes for target in model.plan.allocation)
    pages = {id(page): page.data.nbytes for running in [*engine._running, *engine._again]
             for page in running.sequence.pages}  # fmt: skip
    tree = {id(node.page): node.page.data.nbytes for node in engine.room.tree._used}
    return codes + int(model.artifact.ladder.fixed_bytes) + sum({**tree, **pages}.values())


@dataclass
class Asked:
    request: Request
    tokens: list[int] = field(default_factory=list)
    end: Finished | None = None
    rungs: dict[str, int] | None = None


async def soak(engine: Any, arguments: Any) -> tuple[list[Asked], Watch]:
    watch = Watch(engine)
    watch.attach()
    ending = engine._end_of
    rungs: dict[int, dict[str, int]] = {}

    def noting(running: Any, *rest: Any) -> None:
        rungs[id(running.answer)] = dict(engine._model.plan.allocation)
        ending(running, *rest)

    engine._end_of = noting
    chooser, asked, tasks = random.Random(arguments.seed), [], set()
    seconds = arguments.minutes * 60
    until, began = time.monotonic() + seconds, time.monotonic()
    common = tuple(chooser.randrange(1000, 40000) for _ in range(200))

    async def ask(one: Asked) -> None:
        answer = engine.submit(one.request)
        cancel_after = chooser.randrange(1, 40) if chooser.random() < 1 / 8 else None
        async for event in answer:
            if isinstance(event, Piece):
                one.tokens += [token.id for token in event.tokens]
                if cancel_after is not None and len(one.tokens) >= cancel_after:
                    answer.cancel()
            if isinstance(event, Finished):
                one.end, one.rungs = event, rungs.pop(id(answer), None)

    async def arrive() -> None:
        while time.monotonic() < until:
            lull = (time.monotonic() - began) % 120 > 80  # two thirds busy
            await asyncio.sleep(chooser.expovariate(0.1 if lull else arguments.rate))
            own = tuple(chooser.randrange(1000, 40000) for _ in range(chooser.randrange(8, 500)))
            prompt = (*common, *own) if chooser.random() < 0.3 else own
            drawn = chooser.random() < 0.25
            sampler = Sampler(0.8, 0.95, chooser.randrange(9999)) if drawn else Sampler()
            one = Asked(Request(prompt, chooser.randrange(8, 120), sampler))
            asked.append(one)
            task = asyncio.create_task(ask(one))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    async def change() -> None:
        for index in range(arguments.changes):
            await asyncio.sleep(seconds / (arguments.changes + 1))
            size = chooser.randrange(arguments.low, arguments.high)
            if size < engine.room.memory:
                watch.lowered_at = time.monotonic()
            status = await engine.set_budget(size)
            minutes = (time.monotonic() - began) / 60
            print(f"{minutes:5.1f} min  {index + 1:3d}  {format_size(size):>9}: weights "
                  f"{format_size(status.weights)}, pages {dict(status.pages)}, "
                  f"{status.running} running, {status.waiting} waiting; {len(asked)} asked, "
                  f"worst over {watch.worst_over}", flush=True)  # fmt: skip

    await asyncio.gather(arrive(), change())
    if tasks:
        await asyncio.wait(tasks)
    return asked, watch


def compare(asked: list[Asked], arguments: Any) -> tuple[int, int, list[int]]:
    """How many steady greedy answers there were, how many were asked again, which differ."""
    steady = [index for index, one in enumerate(asked)
              if one.end and one.end.reason in ("stop", "length") and not one.end.resized
              and one.request.sampler.temperature == 0 and one.rungs]  # fmt: skip
    chosen = sorted(random.Random(1).sample(steady, min(len(steady), arguments.again)))
    engine = open_engine(arguments.artifact, context=CONTEXT, most=2,
                         memory=arguments.high, weights="120MiB")  # fmt: skip

    async def again() -> list[int]:
        different = []
        for count, index in enumerate(chosen):
            one = asked[index]
            place(engine._model, one.rungs or {})
            engine.room.tree.clear()
            engine.room.version += 1
            found = Asked(one.request)
            async for event in engine.submit(one.request):
                if isinstance(event, Piece):
                    found.tokens += [token.id for token in event.tokens]
            if found.tokens != one.tokens:
                different.append(index)
            if count % 20 == 0:
                print(f"asked again {count} of {len(chosen)}, {len(different)} differ", flush=True)
        await engine.close()
        return different

    return len(steady), len(chosen), asyncio.run(again())


def place(model: LiveModel, rungs: dict[str, int]) -> None:
    """Bring `model` to exactly these rungs; nothing else runs."""
    from dataclasses import replace

    for target, index in rungs.items():
        if model.plan.allocation[target] != index:
            swap(model, target, model.artifact.load_code(target, index))
    size = model.artifact.ladder.bytes_of(rungs)
    model.plan = replace(model.plan, allocation=rungs, weight_bytes=size)


def main() -> int:
    arguments = parsed()

    async def run() -> tuple[list[Asked], Watch, list[Any], Any]:
        engine = open_engine(arguments.artifact, arguments.low, context=CONTEXT,
                             most=16, swap=arguments.swap)  # fmt: skip
        asked, watch = await soak(engine, arguments)
        decisions, status = engine.decisions(0), engine.status()
        await engine.close()
        return asked, watch, decisions, status

    asked, watch, decisions, status = asyncio.run(run())
    steady, again, different = compare(asked, arguments)
    reasons: dict[str, int] = {}
    for one in asked:
        reason = one.end.reason if one.end else "lost"
        reasons[reason] = reasons.get(reason, 0) + 1
    row = {
        "date": str(date.today()), "minutes": arguments.minutes, "seed": arguments.seed,
        "budget_changes": arguments.changes, "low": arguments.low, "high": arguments.high,
        "requests": len(asked), "ends": reasons, "new_tokens": status.new_tokens,
        "steps": watch.steps, "worst_bytes_over_budget": watch.worst_over,
        "slowest_shrink_seconds": watch.slowest_shrink,
        "bytes_counted_wrong": watch.miscounted, "peak_rss": watch.peak_rss,
        "step_seconds_median": statistics.median(watch.seconds), "decisions": len(decisions),
        "gave_way": sum("request" in d.what for d in decisions),
        "weight_moves": sum("weights from" in d.what for d in decisions),
        "steady_greedy": steady, "asked_again": again, "different": len(different),
    }  # fmt: skip
    write(row)
    lost = reasons.get("lost", 0) + reasons.get("error", 0)
    bad = watch.worst_over > 0 or lost or different or watch.miscounted
    return 1 if bad else 0


def write(row: dict[str, Any]) -> None:
    lines = [
        "# A soak of pliant serve's engine",
        "",
        f"`python bench/soak.py ARTIFACT --minutes {row['minutes']:g}`, {row['date']}, "
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name.replace('_', ' ')} | {value} |" for name, value in row.items()),
    ]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "soak.json").write_text(json.dumps(row, indent=1) + "\n")
    (RESULTS / "soak.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def parsed() -> Any:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("artifact")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--changes", type=int, default=40)
    parser.add_argument("--low", type=parse_size, default="110MiB")
    parser.add_argument("--high", type=parse_size, default="400MiB")
    parser.add_argument("--rate", type=float, default=1.0, help="requests a second when busy")
    parser.add_argument("--again", type=int, default=200, help="answers asked for again")
    parser.add_argument("--swap", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
