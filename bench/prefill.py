"""Reading a prompt on a CPU beside llama.cpp at equal bytes: tokens a second, same machine and run.

    python bench/prefill.py --llama BUILD --gguf F32.gguf [--threads 2] [--rounds 5]

Writes bench/results/prefill_cpu.{json,md}. What BUILD, F32 and the sizes are: bench/decode.py. Both
are measured in alternation, round after round; a figure is the median of its rounds, a ratio the
median of the ratios within rounds. llama.cpp rounds activations to 8 bits, Pliant to 15; the last
column is Pliant with products in float32 (PLIANT_NATIVE=exact).
"""

from __future__ import annotations

import json
import os
import statistics
from pathlib import Path
from typing import Any

from decode import RESULTS, llama_bench, parsed, sides
from pliant.measure.speed import speed

PROMPTS = (256, 512)


def main() -> None:
    given = parsed(__doc__ or "")
    rows = []
    for name, gguf, model in sides(given):
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
    options = ["-p", ",".join(map(str, PROMPTS)), "-n", "0"]
    tests = llama_bench(build, gguf, threads, options)
    return {test["n_prompt"]: statistics.median(test["samples_ts"]) for test in tests}


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
