"""One artifact at twelve sizes: bytes, damage, time to open, time to resize.

    python bench/sizes.py DIR --against smollm2 --text wikitext2-test.txt [--windows 16]

Opens the artifact afresh at twelve sizes of total weight bytes, evenly spaced in logarithms from
the smallest to the largest, each in its own process for the time (`open_s`, imports left out),
then climbs the same sizes live in one process (`resize_s`). Exits with 1 when bytes pass what was
asked, damage rises beyond its interval, an opening takes 2 seconds or a resize 0.5.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from pliant.ladder import Artifact
from pliant.measure import Reference, tensor_bytes
from pliant.model import StreamedModel, open_checkpoint
from pliant.observe import load_text, split, windows
from pliant.run import load
from texts import spread

RESULTS = Path(__file__).parent / "results"
OPEN = """
import sys, time, transformers, pliant.run, torch
started = time.perf_counter()
model = pliant.run.load(sys.argv[1], weights=int(sys.argv[2]))
print(time.perf_counter() - started)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("artifact")
    parser.add_argument("--against", default="smollm2")
    parser.add_argument("--text", required=True)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--sizes", type=int, default=12)
    arguments = parser.parse_args()
    artifact = Artifact.open(arguments.artifact)
    low, high = artifact.ladder.smallest_bytes, artifact.ladder.largest_bytes
    ratio = (high / low) ** (1 / (arguments.sizes - 1))
    sizes = [low, *(int(low * ratio**i) for i in range(1, arguments.sizes - 1)), high]
    opened = [open_seconds(arguments.artifact, size) for size in sizes]

    checkpoint = open_checkpoint(arguments.against)
    tokenizer = checkpoint.tokenizer()
    found = windows(split(load_text(arguments.text), "evaluation"), tokenizer)
    chosen = spread(found, arguments.windows)
    original = StreamedModel(checkpoint, resident=True).module
    reference = Reference.of(original, chosen, key=checkpoint.fingerprint())
    model = load(arguments.artifact, weights=low)
    rows: list[dict[str, Any]] = []
    for size, seconds in zip(sizes, opened, strict=True):
        started = time.perf_counter()
        model.resize(weights=size)
        resized = time.perf_counter() - started
        found_damage = reference.damage(model)
        predicted = max(
            (d for b, d in artifact.ladder.frontier() if b >= model.plan.weight_bytes), default=0.0
        )
        row = {
            "asked": size, "weight_bytes": model.plan.weight_bytes,
            "tensor_bytes": tensor_bytes(model), "predicted": predicted,
            "open_s": seconds, "resize_s": resized, **found_damage.as_dict(),
        }  # fmt: skip
        rows.append(row)
        print(
            f"{size:>10d} asked {row['weight_bytes']:>10d} held  KL {row['kl']:.4f} "
            f"{row['kl_ci95']}  predicted {predicted:.4f}  open {seconds:.2f} s  "
            f"resize {resized:.2f} s",
            flush=True,
        )
    faults = check(rows)
    write(rows, arguments)
    for fault in faults:
        print("FAULT", fault)
    sys.exit(1 if faults else 0)


def open_seconds(directory: str, size: int) -> float:
    done = subprocess.run(
        [sys.executable, "-c", OPEN, directory, str(size)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return float(done.stdout.split()[-1])


def check(rows: list[dict[str, Any]]) -> list[str]:
    faults = []
    for row in rows:
        if row["weight_bytes"] > row["asked"]:
            faults.append(f"{row['weight_bytes']} bytes held where {row['asked']} were asked")
        if row["open_s"] >= 2:
            faults.append(f"opening at {row['asked']} took {row['open_s']:.2f} s")
    for below, above in pairwise(rows):
        if above["kl"] > below["kl_ci95"][1]:
            faults.append(f"damage rises from {below['kl']:.4f} to {above['kl']:.4f}")
        if above["resize_s"] >= 0.5:
            faults.append(f"resizing to {above['asked']} took {above['resize_s']:.2f} s")
    return faults


def write(rows: list[dict[str, Any]], arguments: Any) -> None:
    RESULTS.mkdir(exist_ok=True)
    stem = RESULTS / "sizes"
    stem.with_suffix(".json").write_text(json.dumps(rows, indent=1))
    lines = [
        f"# One artifact of {arguments.against} at {len(rows)} sizes",
        "",
        f"`python bench/sizes.py DIR --against {arguments.against} --text wikitext2-test.txt "
        f"--windows {arguments.windows}`",
        "",
        "| weight bytes asked | held | KL (nats/token) | 95% interval | predicted | perplexity "
        "| top-1 | open (s) | resize (s) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        low, high = r["kl_ci95"]
        lines.append(
            f"| {r['asked']} | {r['weight_bytes']} | {r['kl']:.4f} | {low:.4f} to {high:.4f} | "
            f"{r['predicted']:.4f} | {r['perplexity']:.2f} | {r['top1']:.3f} | "
            f"{r['open_s']:.2f} | {r['resize_s']:.2f} |"
        )
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
