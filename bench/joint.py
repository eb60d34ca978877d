"""One plan for weights and KV cache against a cache of a fixed width, by measured damage.

    python bench/joint.py ARTIFACT --model MODEL --text FILE [--sequences 4] [--context 1024]
                          [--sizes 120MiB,135MiB,150MiB,165MiB,180MiB]

A size is for weights and the KV cache of --sequences sequences of --context tokens together. Three
ways to part it: the joint plan; a cache of 16 bits and the best weights that it leaves room for;
a cache of 8 bits and the best weights that it leaves room for. Each is measured: the mean KL
divergence from the original model over the second half of windows of --context tokens from the
text's first 60%, read 32 tokens at a time, so that what is attended to is coded as it would be
while serving. What the plan predicted stands beside it. Writes bench/results/joint.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import platform
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pliant.api import opened
from pliant.budget import format_size, parse_size
from pliant.cache import Chunk, PagedSequence, PagePool
from pliant.cache.cold import cold_pages
from pliant.ladder import Artifact
from pliant.measure import load_text, split, windows
from pliant.model import open_checkpoint
from pliant.plan.joint import Demand, JointPlan, Split
from pliant.run import load
from pliant.run.packed import PackedModel
from pliant.serve.room import cache_cost, demand_of

RESULTS = Path(__file__).parent / "results"
CHUNK = 32


@torch.inference_mode()
def original_logits(model: Any, ids: Tensor) -> list[Tensor]:
    """Log-probabilities [scored, vocabulary] of each window, in 16 bits: they are kept."""
    half = ids.shape[1] // 2
    return [model(input_ids=one[None]).logits[0, half:].float().log_softmax(-1).half()
            for one in ids]  # fmt: skip


@torch.inference_mode()
def damage(model: Any, original: list[Tensor], ids: Tensor, room: int | None) -> float:
    """Nats a token where the cache of all windows is in `room` bytes (None: 16 bits)."""
    packed = PackedModel(model)
    pool = PagePool(packed.shape, 1 << 62)
    runs, half = [PagedSequence(pool) for _ in ids], ids.shape[1] // 2
    cost = cache_cost(model.artifact, packed.shape)
    total, count = 0.0, 0
    for start in range(0, ids.shape[1], CHUNK):
        part = ids[:, start : start + CHUNK].tolist()
        chunks = [Chunk(s, tokens) for s, tokens in zip(runs, part, strict=True)]
        logits = packed(chunks, every=True).view(len(ids), CHUNK, -1)
        if room is not None:
            come_to(pool, runs, room, cost.widths)
        if start < half:
            continue
        for one, found in zip(original, logits, strict=True):
            exact = one[start - half : start - half + CHUNK].float()
            total += float((exact.exp() * (exact - found.float().log_softmax(-1))).sum())
            count += CHUNK
    if room is not None:
        assert pool.nbytes <= room, (pool.nbytes, room)
    return total / count


def come_to(pool: PagePool, runs: list[PagedSequence], room: int, widths: tuple[int, ...]) -> None:
    """Code cold pages, all to a width before any to the next, until they take `room` bytes."""
    for bits in widths:
        if bits == pool.shape.bits:
            continue
        for run in runs:
            for page in cold_pages(run):
                if pool.nbytes <= room:
                    return
                if page.bits > bits:
                    pool.recode(page, bits)


def main() -> None:
    arguments = parsed()
    artifact = Artifact.open(arguments.artifact)
    text = split(load_text(arguments.text), "evaluation")
    ids = windows(text, artifact.tokenizer(), arguments.context, arguments.sequences)
    original = original_logits(opened(open_checkpoint(arguments.model)), ids)
    model = load(arguments.artifact, weights=artifact.ladder.largest_bytes)
    shape = PackedModel(model).shape
    plan = JointPlan(artifact.ladder.frontier(), cache_cost(artifact, shape))
    demand = demand_of(shape, [arguments.context] * arguments.sequences)
    rows: list[dict[str, Any]] = []
    for size in arguments.sizes:
        for name, found in ways(plan, size, demand).items():
            row: dict[str, Any] = {"size": size, "way": name}
            if found is not None:
                room = None if name == "16 bits" else found.cache
                model.resize(weights=found.weights)
                row |= {"weights": model.plan.weight_bytes, "cache": found.cache,
                        "bits": found.bits, "predicted": found.damage,
                        "measured": damage(model, original, ids, room)}  # fmt: skip
            rows.append(row)
            print(row, flush=True)
    write(rows, arguments)


def ways(plan: JointPlan, size: int, demand: Demand) -> dict[str, Split | None]:
    return {
        "joint": plan.split(size, demand),
        "16 bits": plan.fixed(size, demand, 16),
        "8 bits": plan.fixed(size, demand, 8),
    }


def write(rows: list[dict[str, Any]], arguments: Any) -> None:
    lines = [
        "# One plan for weights and KV cache",
        "",
        f"`python bench/joint.py ARTIFACT --sequences {arguments.sequences} --context "
        f"{arguments.context}`, {date.today()}, {platform.processor() or platform.machine()}. "
        "Sizes are of weights and cache together; damage in nats a token.",
        "",
        "| size | way | weights | narrowest page | damage predicted | measured |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        size = format_size(row["size"])
        if "measured" not in row:
            lines.append(f"| {size} | {row['way']} | does not fit | | | |")
            continue
        lines.append(
            f"| {size} | {row['way']} | {format_size(row['weights'])} | {row['bits']} bits | "
            f"{row['predicted']:.4f} | {row['measured']:.4f} |"
        )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "joint.json").write_text(json.dumps(rows, indent=1) + "\n")
    (RESULTS / "joint.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def parsed() -> Any:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("artifact")
    parser.add_argument("--model", default="smollm2", help="the original")
    parser.add_argument("--text", required=True)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--sizes", default="120MiB,135MiB,150MiB,165MiB,180MiB")
    arguments = parser.parse_args()
    arguments.sizes = [parse_size(part) for part in arguments.sizes.split(",")]
    return arguments


if __name__ == "__main__":
    main()
