"""Damage of an artifact's linear layers at fixed code bits, head and embedding untouched.

    python bench/absolute.py ARTIFACT --against MODEL --text wikitext2-test.txt [--device cuda]

The first 20% of the text in windows of 512, every position scored. A size of b bits is what
uniform integers of b bits take with a 16-bit scale and a zero point for each group of 64; 2.5 and
3.5 are the means of their neighbours. Writes bench/results/absolute.{json,md}.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from pliant.api import opened
from pliant.codes import Dense, GroupInt
from pliant.ladder import Artifact, Ladder
from pliant.measure import Reference
from pliant.model import StreamedModel, coded_model, open_checkpoint
from pliant.observe import load_text, windows

RESULTS = Path(__file__).parent / "results"
TARGETS = {2.5: 0.55, 3.0: 0.27, 3.5: 0.14, 4.0: 0.08}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("artifact")
    parser.add_argument("--against", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--windows", type=int, default=None)
    arguments = parser.parse_args()
    checkpoint = open_checkpoint(arguments.against)
    text = load_text(arguments.text)
    ids = windows(text[: len(text) // 5], checkpoint.tokenizer())[: arguments.windows]
    original = opened(checkpoint).to(arguments.device)
    reference = Reference.of(original, ids, "all")
    rows = [
        {"bits": bits, "target": target, **row}
        for (bits, target), row in zip(
            TARGETS.items(), measure(arguments.artifact, checkpoint, reference, arguments.device),
            strict=True,
        )
    ]  # fmt: skip
    write(rows, arguments, len(ids))


def measure(
    directory: str, checkpoint: Any, reference: Reference, device: str
) -> list[dict[str, Any]]:
    """Bytes of the linear layers and damage at each size of TARGETS."""
    artifact = Artifact.open(directory)
    model = StreamedModel(checkpoint)
    ladder = linear_ladder(artifact)
    outer = {t.name: Dense(model.weight(t)) for t in model.targets if t.block is None}
    rows = []
    for bits in TARGETS:
        allocation = ladder.allocation(linear_bytes(model, bits))
        codes = {t: artifact.load_code(t, i) for t, i in allocation.items()} | outer
        held = coded_model(checkpoint.directory, codes, dict(model.others())).to(device)
        damage = reference.damage(held)
        rows.append({"bytes": ladder.bytes_of(allocation), **damage.as_dict()})
        print(f"{bits} bits: {rows[-1]['bytes']} bytes, KL {damage.kl:.4f}", flush=True)
    return rows


def linear_ladder(artifact: Artifact) -> Ladder:
    """The artifact's ladder without embedding and head."""
    inside = {t["name"] for t in artifact.targets if t["block"] is not None}
    ladder = artifact.ladder
    return dataclasses.replace(
        ladder,
        rungs={t: rungs for t, rungs in ladder.rungs.items() if t in inside},
        climb=tuple(step for step in ladder.climb if step.target in inside),
        fixed_bytes=0,
    )


def linear_bytes(model: StreamedModel, bits: float) -> int:
    """Bytes of uniform integers in all linear layers; between two widths, their mean."""
    low = int(bits)
    sizes = [
        sum(
            GroupInt.size(*t.shape, width, 64, zeros=True)
            for t in model.targets
            if t.block is not None
        )
        for width in (low, low + 1)
    ]
    return int(sizes[0] + (bits - low) * (sizes[1] - sizes[0]))


def write(rows: list[dict[str, Any]], arguments: Any, count: int) -> None:
    RESULTS.mkdir(exist_ok=True)
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
    lines = [
        "# Linear layers at fixed code bits",
        "",
        f"`python bench/absolute.py ARTIFACT --against {Path(arguments.against).name} "
        f"--text wikitext2-test.txt` on {device}: {count} windows of 512, every position scored,",
        "head and embedding untouched.",
        "",
        "| code bits | bytes | KL (nats/token) | 95% interval | perplexity | top-1 | target | ok |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["kl_ci95"]
        lines.append(
            f"| {row['bits']} | {row['bytes']} | {row['kl']:.4f} | {low:.4f} to {high:.4f} | "
            f"{row['perplexity']:.2f} | {row['top1']:.3f} | {row['target']} | "
            f"{'yes' if row['kl'] <= row['target'] else 'no'} |"
        )
    (RESULTS / "absolute.json").write_text(json.dumps(rows, indent=1) + "\n")
    (RESULTS / "absolute.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
