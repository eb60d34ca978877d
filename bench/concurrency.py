"""How many requests run at once in one budget, and how fast: ours against transformers' own.

    python bench/concurrency.py ARTIFACT [--memory 400MiB] [--prompt 1920] [--new 128]
                                [--requests 16] [--ours-only]

Both serve the same random prompts, greedy, all asked at once, each in a process of its own. The
peer is transformers' continuous batching (`generate_batch`) with the model in bfloat16, its default
page size and as many cache blocks as the budget leaves beside the weights; nothing is taken off for
its activations, which are in our budget. Ours is the engine of `pliant serve`. Concurrency is the
most requests that run at once; throughput is new tokens, and prompt tokens, over the time until the
last answer ends. Ours says the damage that it expects of the weights and pages that it came to;
bench/joint.py measures such expectations.

Writes bench/results/concurrency.{json,md}.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import random
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import torch

from pliant.budget import format_size, parse_size

RESULTS = Path(__file__).parent / "results"
BLOCK_TOKENS = 256  # the peer's default


def prompts(arguments: Any) -> list[list[int]]:
    chooser = random.Random(0)
    return [[chooser.randrange(1000, 40000) for _ in range(arguments.prompt)]
            for _ in range(arguments.requests)]  # fmt: skip


def ours(arguments: Any) -> dict[str, Any]:
    from pliant.run import Sampler
    from pliant.serve.opening import open_engine
    from pliant.serve.request import Request

    context = arguments.prompt + arguments.new
    engine = open_engine(arguments.artifact, arguments.memory, context=context,
                         most=arguments.requests)  # fmt: skip
    seen: list[Any] = []

    async def ask(prompt: list[int]) -> int:
        events = [event async for event in
                  engine.submit(Request(tuple(prompt), arguments.new, Sampler()))]  # fmt: skip
        return int(events[-1].new_tokens)

    async def run() -> dict[str, Any]:
        began = time.monotonic()
        work = asyncio.gather(*map(ask, prompts(arguments)))
        while not work.done():
            seen.append(engine.status())
            await asyncio.sleep(0.05)
        seconds, new = time.monotonic() - began, sum(await work)
        await engine.close()
        worst = max((s.damage or 0) + (s.cache_damage or 0) for s in seen)
        fullest = max(seen, key=lambda s: s.running)
        return {
            "concurrent": fullest.running, "seconds": seconds, "new_tokens": new,
            "weights": fullest.weights, "cache": max(s.cache for s in seen),
            "held_most": max(s.weights + s.cache + s.activations for s in seen),
            "pages": dict(seen[len(seen) // 2].pages), "damage_expected": worst,
        }  # fmt: skip

    return asyncio.run(run())


def theirs(arguments: Any) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    from pliant.cache import PageShape
    from pliant.model import open_checkpoint

    source = open_checkpoint("smollm2" if arguments.model is None else arguments.model)
    model = AutoModelForCausalLM.from_pretrained(
        source.directory, dtype=torch.bfloat16, attn_implementation="sdpa"
    ).eval()  # fmt: skip
    weights = sum({p.data_ptr(): p.nbytes for p in model.parameters()}.values())
    token = PageShape.of(model.config).nbytes() // 16
    blocks = (arguments.memory - weights) // (token * BLOCK_TOKENS)
    length = arguments.prompt + arguments.new
    concurrent = blocks // -(-length // BLOCK_TOKENS)
    config = GenerationConfig(
        max_new_tokens=arguments.new, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    batching = ContinuousBatchingConfig(
        page_size=BLOCK_TOKENS, num_blocks=int(blocks), max_batch_tokens=512
    )
    began = time.monotonic()
    found = model.generate_batch(
        prompts(arguments), generation_config=config, continuous_batching_config=batching,
        warmup=False,
    )  # fmt: skip
    seconds = time.monotonic() - began
    new = sum(len(one.generated_tokens) for one in found.values())
    return {
        "concurrent": min(int(concurrent), arguments.requests), "seconds": seconds,
        "new_tokens": new, "weights": weights, "cache": int(blocks) * token * BLOCK_TOKENS,
    }  # fmt: skip


def main() -> None:
    arguments = parsed()
    if arguments.part:
        found = (ours if arguments.part == "ours" else theirs)(arguments)
        found["peak_rss"] = psutil.Process().memory_info().rss
        print(json.dumps(found))
        return
    rows = {}
    for part in ("ours", "transformers")[: 1 if arguments.ours_only else 2]:
        command = [sys.executable, __file__, *sys.argv[1:], "--part", part]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows[part] = json.loads(done.stdout.splitlines()[-1])
        print(part, rows[part], flush=True)
    write(rows, arguments)


def write(rows: dict[str, Any], arguments: Any) -> None:
    lines = [
        "# Requests at once in one budget",
        "",
        f"`python bench/concurrency.py ARTIFACT --memory {format_size(arguments.memory)} --prompt "
        f"{arguments.prompt} --new {arguments.new} --requests {arguments.requests}`, "
        f"{date.today()}, {platform.processor() or platform.machine()}, "
        f"{torch.get_num_threads()} threads.",
        "",
        "| | at once | weights | cache | seconds | new tokens/s | prompt tokens/s | damage |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        new, read = row["new_tokens"], arguments.prompt * arguments.requests
        damage = f"{row['damage_expected']:.4f}" if "damage_expected" in row else "0"
        lines.append(
            f"| {name} | {row['concurrent']} | {format_size(row['weights'])} | "
            f"{format_size(row['cache'])} | {row['seconds']:.1f} | {new / row['seconds']:.1f} | "
            f"{read / row['seconds']:.0f} | {damage} |"
        )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "concurrency.json").write_text(json.dumps(rows, indent=1) + "\n")
    (RESULTS / "concurrency.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def parsed() -> Any:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("artifact")
    parser.add_argument("--memory", type=parse_size, default="400MiB")
    parser.add_argument("--model", help="the peer's; default: smollm2")
    parser.add_argument("--prompt", type=int, default=1920)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--ours-only", action="store_true")
    parser.add_argument("--part", choices=["ours", "transformers"])
    return parser.parse_args()


if __name__ == "__main__":
    main()
