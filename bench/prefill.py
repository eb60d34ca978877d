"""Reading a prompt on a CPU beside llama.cpp at equal bytes: tokens a second, same machine and run.

    python bench/prefill.py --llama BUILD --gguf F32.gguf [--threads 2] [--rounds 5]

Writes bench/results/prefill_cpu.{json,md}. What BUILD, F32 and the sizes are: bench/decode.py. Both
are measured in alternation, round after round; a figure is the median of its rounds, a ratio the
median of the ratios within rounds. llama.cpp rounds activations to 8 bits, Pliant to 15; the last
column is Pliant with products in float32 (PLIANT_NATIVE=exact).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from decode import RESULTS, TYPES, uniform
from pliant.measure.speed import speed
from pliant.run import load

PROMPTS = (256, 512)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--source", default=str(Path.home() / ".cache/pliant/smollm2-regrid"))
    parser.add_argument("--llama", type=Path, required=True)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows = []
    with tempfile.TemporaryDirectory() as work:
        for name, bits in TYPES.items():
            gguf = Path(work) / f"{name}.gguf"
            quantize = [given.llama / "bin/llama-quantize", "--pure", given.gguf, gguf, name]
            subprocess.run(quantize, check=True, capture_output=True)
            model = load(uniform(given.source, Path(work) / name, bits), weights="1GiB")
            rounds: list[dict[str, dict[int, float]]] = [
                {
                    "llama": llama(given.llama, gguf, given.threads),
                    "pliant": ours(model, ""),
                    "float32": ours(model, "exact"),
                }
                for _ in range(given.rounds)
            ]
            rows += [summary(name, prompt, rounds) for prompt in PROMPTS]
    write(rows, given.threads)


def ours(model: Any, how: str) -> dict[int, float]:
    os.environ["PLIANT_NATIVE"] = how
    return {prompt: speed(model, prompt, 1, repeats=3).prefill_tps for prompt in PROMPTS}


def llama(build: Path, gguf: Path, threads: int) -> dict[int, float]:
    command = [build / "bin/llama-bench", "-m", gguf, "-t", str(threads),
               "-p", ",".join(map(str, PROMPTS)), "-n", "0", "-r", "3", "-o", "json"]  # fmt: skip
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {t["n_prompt"]: statistics.median(t["samples_ts"]) for t in json.loads(said)}


def summary(name: str, prompt: int, rounds: list[dict[str, dict[int, float]]]) -> dict[str, Any]:
    row: dict[str, Any] = {"type": name, "prompt": prompt}
    for who in ("llama", "pliant", "float32"):
        row[who] = statistics.median(r[who][prompt] for r in rounds)
    row["ratio"] = statistics.median(r["pliant"][prompt] / r["llama"][prompt] for r in rounds)
    row["rounds"] = [{who: tps[prompt] for who, tps in r.items()} for r in rounds]
    print(json.dumps(row | {"rounds": None}), flush=True)
    return row


def write(rows: list[dict[str, Any]], threads: int) -> None:
    about = {"threads": threads, "load": os.getloadavg()}
    text = [
        f"SmolLM2-135M on {threads} threads, prompts in pieces of 128 tokens; tokens a second,",
        "medians of alternating rounds (bench/prefill.py). Weights in the same bytes on both.",
        "",
        "| size | prompt | llama.cpp | Pliant | ratio | Pliant, float32 |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        text.append(
            f"| {row['type']} | {row['prompt']} | {row['llama']:.0f} | {row['pliant']:.0f} "
            f"| {row['ratio']:.2f} | {row['float32']:.0f} |"
        )
    (RESULTS / "prefill_cpu.json").write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    (RESULTS / "prefill_cpu.md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
