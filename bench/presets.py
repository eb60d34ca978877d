"""What each effort takes and gives: seconds, peak memory, damage at one size, on this machine.

    python bench/presets.py --text wikitext2-test.txt [--efforts quick,balanced] [--weights 69MiB]
                            [--model smollm2] [--device cpu] [--work DIR]

Each effort fits in a process of its own, text that the model writes included, and the artifact is
opened at the same bytes of weights. Damage: 24 windows of the text's first 60%, the second half of
each scored. Writes bench/results/presets.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from pliant.api import opened
from pliant.budget import format_size, parse_size
from pliant.measure import Reference
from pliant.measure.memory import run_child
from pliant.model import open_checkpoint
from pliant.observe import load_text, split, windows
from quality_ours import Ours
from texts import spread

RESULTS = Path(__file__).parent / "results"
LIMITS = {"quick": 180, "balanced": 600}  # seconds, on two cores


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--text", required=True, help="WikiText-2's raw test split")
    parser.add_argument("--efforts", default="quick,balanced")
    parser.add_argument("--weights", default="69MiB")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", default=None)
    arguments = parser.parse_args()
    work = Path(arguments.work or tempfile.mkdtemp(prefix="pliant-bench-"))
    checkpoint = open_checkpoint(arguments.model)
    found = windows(split(load_text(arguments.text), "evaluation"), checkpoint.tokenizer())
    ids = spread(found, 24)
    reference = Reference.of(opened(checkpoint).to(arguments.device), ids)
    rows = []
    for effort in arguments.efforts.split(","):
        out = work / effort
        before, started = os.getloadavg()[0], time.monotonic()
        done = run_child(
            [sys.executable, "-m", "pliant", "fit", arguments.model, "--memory", "128MiB",
             "--effort", effort, "--device", arguments.device, "-o", str(out), "--overwrite",
             "--json"]
        )  # fmt: skip
        if done.returncode:
            sys.exit(done.stderr)
        row: dict[str, Any] = {"effort": effort, "seconds": time.monotonic() - started,
                               "peak": done.peak, "load_before": before}  # fmt: skip
        ours = Ours(out, "total", checkpoint, arguments.device)
        row["bytes"] = ours.go_to(parse_size(arguments.weights))
        rows.append(row | reference.damage(ours.model).as_dict())
        print(f"{effort}: {row['seconds']:.0f} s, KL {rows[-1]['kl']:.4f}", flush=True)
    write(rows, arguments)


def write(rows: list[dict[str, Any]], arguments: Any) -> None:
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else "two CPU cores"
    lines = [
        "# Efforts",
        "",
        f"`python bench/presets.py --text wikitext2-test.txt --weights {arguments.weights}`: "
        f"{arguments.model} on {device}.",
        "",
        "| effort | seconds | limit | peak memory | weights | KL | 95% interval | top-1 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["kl_ci95"]
        limit = LIMITS.get(row["effort"], "")
        lines.append(
            f"| {row['effort']} | {row['seconds']:.0f} | {limit} | {format_size(row['peak'])} | "
            f"{format_size(row['bytes'])} | {row['kl']:.4f} | {low:.4f} to {high:.4f} | "
            f"{row['top1']:.3f} |"
        )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "presets.json").write_text(json.dumps(rows, indent=1) + "\n")
    (RESULTS / "presets.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
