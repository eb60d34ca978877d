"""Tokens a second of the engines behind `pliant serve`, for some numbers of users at once.

    python bench/serving.py ARTIFACT [--users 1,2,4,8] [--prompt 64] [--new 64] [--memory SIZE]

All users ask at once, without HTTP: random prompts of --prompt tokens, greedy answers of --new. The
artifact is opened for as many sequences as there are users at most, with the same weights for both
engines. Tokens a second are all new ones over the time until the last answer ends; "first" is the
mean time until a user has a first token. Writes bench/results/serving.{json,md}.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

from pliant.run import load
from pliant.serve.batching import BatchingEngine
from pliant.serve.request import Request
from pliant.serve.sequential import SequentialEngine

RESULTS = Path(__file__).parent / "results"
ENGINES = {"one at a time": SequentialEngine, "batching": BatchingEngine}


def main() -> None:
    arguments = parsed()
    model = load(arguments.artifact, arguments.memory, context=arguments.prompt + arguments.new,
                 batch=max(arguments.users))  # fmt: skip
    tokenizer = model.artifact.tokenizer()
    rows = []
    for users in arguments.users:
        for name, kind in ENGINES.items():
            rows.append({"engine": name, "users": users} | asyncio.run(
                measured(kind, model, tokenizer, users, arguments)
            ))  # fmt: skip
            print(rows[-1], flush=True)
    write(rows, model, arguments)


async def measured(
    kind: Any, model: Any, tokenizer: Any, users: int, arguments: Any
) -> dict[str, float]:
    options = {"most": users, "fixed": True} if kind is BatchingEngine else {}
    engine = kind(model, tokenizer, **options)
    try:
        await asyncio.gather(*(ask(engine, prompt(engine, 1000 + i, arguments), 4)
                               for i in range(users)))  # fmt: skip
        began = time.monotonic()
        asked = [ask(engine, prompt(engine, i, arguments), arguments.new) for i in range(users)]
        found = await asyncio.gather(*asked)
        seconds = time.monotonic() - began
    finally:
        await engine.close()
    new = sum(count for count, _ in found)
    first = sum(at - began for _, at in found) / users
    return {"tokens_per_second": new / seconds, "first_seconds": first, "new_tokens": new}


def prompt(engine: Any, seed: int, arguments: Any) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(engine.vocabulary, (arguments.prompt,), generator=generator)
    return tuple(ids.tolist())


async def ask(engine: Any, tokens: tuple[int, ...], new: int) -> tuple[int, float]:
    """New tokens, and when the first of them came."""
    events = [(event, time.monotonic()) async for event in engine.submit(Request(tokens, new))]
    return events[-1][0].new_tokens, events[0][1]


def parsed() -> Any:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("artifact")
    parser.add_argument("--users", default="1,2,4,8")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--memory", help="total; default: as fitted")
    arguments = parser.parse_args()
    arguments.users = [int(part) for part in arguments.users.split(",")]
    return arguments


def write(rows: list[dict[str, Any]], model: Any, arguments: Any) -> None:
    about = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    lines = [
        "# Engines behind pliant serve",
        "",
        f"`python bench/serving.py {Path(arguments.artifact).name} ...` on {about}: "
        f"{model.plan.weight_bytes / 2**20:.0f} MiB of weights, prompts of {arguments.prompt} "
        f"tokens, answers of {arguments.new}.",
        "",
        "| users at once | engine | tokens/s | seconds to the first token |",
        "|---|---|---|---|",
        *(
            f"| {row['users']} | {row['engine']} | {row['tokens_per_second']:.1f} "
            f"| {row['first_seconds']:.2f} |"
            for row in rows
        ),
    ]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "serving.json").write_text(json.dumps(rows, indent=1) + "\n")
    (RESULTS / "serving.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
