"""Decoding on a CPU beside llama.cpp at equal bytes: tokens a second, same machine, same run.

    python bench/decode.py --llama BUILD --gguf F32.gguf [--threads 2] [--rounds 5]

Writes bench/results/decode_cpu.{json,md}. BUILD is a build of llama.cpp with llama-bench and
llama-quantize (bench/peers/_ggml.py makes one; `cmake --build BUILD --target llama-bench`), F32
the GGUF that its converter writes. Both are measured in alternation, round after round; a
figure is the median of its rounds, a ratio the median of the ratios within rounds. Q4_0 is beside
4 bits and Q8_0 beside 8 bits in groups of 32 with scales of 16 bits: the same bytes. llama.cpp
rounds activations to 8 bits; ours are measured so (PLIANT_NATIVE=int8) and by default, in 16 bits.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pliant.ladder import Ladder, Proposal, Writer
from pliant.measure.speed import speed
from pliant.methods.quantize.rtn import rtn
from pliant.model import find_targets, open_checkpoint
from pliant.model.architecture import empty_model
from pliant.observe.statistics import Statistics
from pliant.run import load

RESULTS = Path(__file__).parent / "results"
TYPES = {"Q4_0": 4, "Q8_0": 8}
BEHIND, ANSWER = (16, 256), 64  # tokens before the answer, and its own


def main() -> None:
    given = parsed(__doc__ or "")
    rows = []
    for name, gguf, model in sides(given):
        rounds: list[dict[str, dict[int, float]]] = [
            {
                "llama": llama(given.llama, gguf, given.threads),
                "int8": ours(model, "int8"),
                "default": ours(model, "default"),
            }
            for _ in range(given.rounds)
        ]
        sizes = {"llama_bytes": gguf.stat().st_size, "pliant_bytes": model.plan.weight_bytes}
        rows += [{"type": name} | sizes | summary(behind, rounds) for behind in BEHIND]
    write(rows, given.threads)


def parsed(doc: str) -> Any:
    """What this bench and bench/prefill.py are given; torch takes as many threads."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--source", default=str(Path.home() / ".cache/pliant/smollm2-regrid"))
    parser.add_argument("--llama", type=Path, required=True)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    return given


def sides(given: Any) -> Iterator[tuple[str, Path, Any]]:
    """Each type's name, llama.cpp's file of it, and our model in the same bytes."""
    with tempfile.TemporaryDirectory() as work:
        for name, bits in TYPES.items():
            gguf = Path(work) / f"{name}.gguf"
            quantize = [given.llama / "bin/llama-quantize", "--pure", given.gguf, gguf, name]
            subprocess.run(quantize, check=True, capture_output=True)
            yield name, gguf, load(uniform(given.source, Path(work) / name, bits), weights="1GiB")


def uniform(source: str, out: Path, bits: int) -> Path:
    """An artifact of one rung a target: plain rounding in groups of 32, scales of 16 bits."""
    checkpoint = open_checkpoint(source)
    targets = find_targets(empty_model(checkpoint.config))
    writer, proposals = Writer(out, key="decode"), []
    for target in targets:
        weight = target.slice(checkpoint.read(target.parameter).float())
        code = rtn(weight, Statistics(), bits=bits, group_size=32, symmetric=True, clip=False)
        proposals.append(Proposal(target.name, "rtn", {"bits": bits}, code, 0.0))
    writer.write("all", proposals)
    taken = {t.parameter for t in targets} | {name for t in targets for name in t.tied}
    fixed = [name for name in checkpoint.names() if name not in taken]
    writer.write_fixed({name: checkpoint.read(name).float() for name in fixed})
    rungs = {name: tuple(own) for name, own in writer.all_rungs().items()}
    return writer.finish(
        Ladder(rungs, (), writer.fixed_bytes, 1.0),
        files={"config.json": checkpoint.config.to_json_string(), "recipe.yaml": "seed: 0\n"},
        targets=[dataclasses.asdict(t) for t in targets],
        budget=None,
        recipe={},
        provenance={"source": source},
    )


def ours(model: Any, activations: str) -> dict[int, float]:
    os.environ["PLIANT_NATIVE"] = activations
    return {behind: speed(model, behind, ANSWER, repeats=3).decode_tps for behind in BEHIND}


def llama(build: Path, gguf: Path, threads: int) -> dict[int, float]:
    depths = ",".join(map(str, BEHIND))
    tests = llama_bench(build, gguf, threads, ["-p", "0", "-n", str(ANSWER), "-d", depths])
    return {test["n_depth"]: statistics.median(test["samples_ts"]) for test in tests}


def llama_bench(build: Path, gguf: Path, threads: int, options: list[str]) -> list[dict[str, Any]]:
    """What llama-bench says of each of its tests, three samples of each."""
    command = [build / "bin/llama-bench", "-m", gguf, "-t", str(threads), "-r", "3", "-o", "json"]
    said = subprocess.run([*command, *options], check=True, capture_output=True, text=True)
    tests: list[dict[str, Any]] = json.loads(said.stdout)
    return tests


def summary(behind: int, rounds: list[dict[str, dict[int, float]]]) -> dict[str, Any]:
    row: dict[str, Any] = {"behind": behind}
    for who in ("llama", "int8", "default"):
        row[who] = statistics.median(r[who][behind] for r in rounds)
        row[f"{who}_ratio"] = statistics.median(r[who][behind] / r["llama"][behind] for r in rounds)
    row["rounds"] = [{who: tps[behind] for who, tps in r.items()} for r in rounds]
    print(json.dumps(row | {"rounds": None}), flush=True)
    return row


def write(rows: list[dict[str, Any]], threads: int) -> None:
    about = {"threads": threads, "answer": ANSWER, "load": os.getloadavg()}
    text = [
        f"SmolLM2-135M on {threads} threads, {ANSWER} tokens decoded behind so many; tokens a",
        "second, medians of alternating rounds (bench/decode.py); bytes are the files' of",
        "llama.cpp and the weights' of Pliant. llama.cpp holds activations in 8 bits, Pliant in",
        "16, or in 8 with PLIANT_NATIVE=int8.",
        "",
        "| size | MiB llama.cpp | MiB Pliant | behind | llama.cpp | Pliant | ratio "
        "| int8 | ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        text.append(
            f"| {row['type']} | {row['llama_bytes'] / 2**20:.0f} "
            f"| {row['pliant_bytes'] / 2**20:.0f} | {row['behind']} | {row['llama']:.0f} "
            f"| {row['default']:.0f} | {row['default_ratio']:.2f} "
            f"| {row['int8']:.0f} | {row['int8_ratio']:.2f} |"
        )
    (RESULTS / "decode_cpu.json").write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    (RESULTS / "decode_cpu.md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
