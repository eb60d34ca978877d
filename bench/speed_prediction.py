"""Predicted decode speed beside measured: an artifact at many sizes, on this machine.

    python bench/speed_prediction.py DIR [DIR ...] [--sizes 8] [--threads 2] [--rounds 5]
                                     [--device cuda]

Writes bench/results/speed_prediction.{json,md}. The prediction is what `pliant inspect` shows: the
token's products, each timed alone with codes of its kind and shape, and what is between them. It is
made anew (--kept takes what the cache directory holds) and before anything is measured. Measured
is what `pliant.measure.speed` measures on one running model, resized; rounds go over all sizes in
turn, and a figure is the median of its rounds. Runs of other artifacts or numbers of threads stay
in the results.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from pliant.bench import costs_of_artifact, predicted_speed
from pliant.ladder import Artifact
from pliant.measure.speed import speed
from pliant.plan.bandwidth import bandwidth, processor_name
from pliant.run import load

RESULTS = Path(__file__).parent / "results"
PROMPT, ANSWER = 8, 24
POSITION = PROMPT + ANSWER // 2
TARGET = 0.15


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("artifacts", nargs="+", type=Path)
    parser.add_argument("--sizes", type=int, default=8)
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--kept", action="store_true", help="predict from what is kept")
    given = parser.parse_args()
    path = RESULTS / "speed_prediction.json"
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    for threads in given.threads:
        torch.set_num_threads(threads)
        for directory in given.artifacts:
            artifact = Artifact.open(directory)
            began = time.perf_counter()
            costs = costs_of_artifact(artifact, given.device, refresh=not given.kept)
            took = time.perf_counter() - began
            name = processor_name(torch.device(given.device))
            about = {"artifact": directory.name, "threads": threads, "device": name,
                     "calibration_seconds": took}  # fmt: skip
            rows = compare(artifact, costs, given.sizes, given.rounds, given.device)
            same = (directory.name, threads, given.device == "cuda")
            runs = [run for run in runs if _key(run) != same]
            runs.append(about | {"load": os.getloadavg()[0], "rows": rows})
    write(sorted(runs, key=lambda run: (-run["threads"], run["artifact"])))


def _key(run: dict[str, Any]) -> tuple[str, int, bool]:
    """What a run replaces: of one artifact, with so many threads, on a GPU or not."""
    return run["artifact"], run["threads"], "threads" not in run.get("device", "threads")


def compare(
    artifact: Artifact, costs: Any, count: int, rounds: int, device: str = "cpu"
) -> list[dict[str, Any]]:
    """Rows by size: weight bytes, tokens a second predicted, and measured in each round."""
    ladder = artifact.ladder
    low, high = ladder.smallest_bytes, ladder.largest_bytes
    sizes = [low + (high - low) * i // (count - 1) for i in range(count)]
    model = load(artifact.directory, weights=low, context=PROMPT + ANSWER, device=device)
    ceiling = bandwidth(device).bytes_per_second
    rows: dict[int, dict[str, Any]] = {}
    for _ in range(rounds):
        for size in sizes:
            plan = model.resize(weights=size)
            row = rows.setdefault(
                size,
                {"weight_bytes": plan.weight_bytes,
                 "predicted": predicted_speed(artifact, plan.allocation, costs, POSITION),
                 "ceiling": ceiling / plan.weight_bytes, "rounds": []},
            )  # fmt: skip
            row["rounds"].append(speed(model, PROMPT, ANSWER, repeats=1).decode_tps)
    for row in rows.values():
        row["measured"] = statistics.median(row["rounds"])
        row["error"] = row["predicted"] / row["measured"] - 1
        print(json.dumps(row), flush=True)
    return list(rows.values())


def write(runs: list[dict[str, Any]]) -> None:
    text = [
        f"Decode tokens a second of SmolLM2-135M artifacts, {PROMPT} tokens of prompt and {ANSWER}",
        "of answer, medians of rounds over all sizes (bench/speed_prediction.py). The",
        "ceiling is the memory's bandwidth over the bytes of the weights, all that was predicted",
        "before.",
    ]
    for run in runs:
        errors = [abs(row["error"]) for row in run["rows"]]
        text += [
            "",
            f"{run['artifact']}, {run.get('device', 'CPU')}, threads: {run['threads']}, rounds: "
            f"{len(run['rows'][0]['rounds'])}: largest error {max(errors):.1%}, mean "
            f"{statistics.mean(errors):.1%}; {sum(e <= TARGET for e in errors)} of {len(errors)} "
            f"within {TARGET:.0%}. Calibrated in {run['calibration_seconds']:.0f} s; load "
            f"{run['load']:.1f}.",
            "",
            "| MiB | predicted | measured | error | rounds, least to most | ceiling |",
            "|---|---|---|---|---|---|",
        ]
        for row in run["rows"]:
            text.append(
                f"| {row['weight_bytes'] / 2**20:.1f} | {row['predicted']:.1f} | "
                f"{row['measured']:.1f} | {row['error']:+.1%} | {min(row['rounds']):.1f} to "
                f"{max(row['rounds']):.1f} | {row['ceiling']:.0f} |"
            )
    (RESULTS / "speed_prediction.json").write_text(json.dumps({"runs": runs}, indent=1) + "\n")
    (RESULTS / "speed_prediction.md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
