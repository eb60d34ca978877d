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
PROMPT, ANSWER = 256, 64


def main() -> None:
    given = parsed(__doc__ or "")
    rows = []
    for name, gguf, model in sides(given):
        rounds = [
            {
                "llama": llama(given.llama, gguf, given.threads),
                "pliant": ours(model, "int8"),
                "default": ours(model, "default"),
            }
            for _ in range(given.rounds)
        ]
        rows.append(summary(name, gguf.stat().st_size, model.plan.weight_bytes, rounds))
        print(json.dumps(rows[-1] | {"rounds": None}), flush=True)
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


def ours(model: Any, activations: str) -> dict[str, float]:
    os.environ["PLIANT_NATIVE"] = activations
    found = speed(model, PROMPT, ANSWER, repeats=3)
    return {"prefill": found.prefill_tps, "decode": found.decode_tps}


def llama(build: Path, gguf: Path, threads: int) -> dict[str, float]:
    """A prompt, and an answer behind so long a prompt, as ours is measured."""
    found = {}
    for kind, options in (
        ("prefill", ["-p", str(PROMPT), "-n", "0"]),
        ("decode", ["-p", "0", "-n", str(ANSWER), "-d", str(PROMPT)]),
    ):
        (test,) = llama_bench(build, gguf, threads, options)
        found[kind] = statistics.median(test["samples_ts"])
    return found


def llama_bench(build: Path, gguf: Path, threads: int, options: list[str]) -> list[dict[str, Any]]:
    """What llama-bench says of each of its tests, three samples of each."""
    command = [build / "bin/llama-bench", "-m", gguf, "-t", str(threads), "-r", "3", "-o", "json"]
    said = subprocess.run([*command, *options], check=True, capture_output=True, text=True)
    tests: list[dict[str, Any]] = json.loads(said.stdout)
    return tests


def summary(name: str, theirs: int, ours: int, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {"type": name, "llama_bytes": theirs, "pliant_bytes": ours}
    for kind in ("decode", "prefill"):
        for who in ("llama", "pliant"):
            row[f"{who}_{kind}"] = statistics.median(r[who][kind] for r in rounds)
        row[f"{kind}_ratio"] = statistics.median(
            r["pliant"][kind] / r["llama"][kind] for r in rounds
        )
    row["default_decode"] = statistics.median(r["default"]["decode"] for r in rounds)
    row["default_ratio"] = statistics.median(
        r["default"]["decode"] / r["llama"]["decode"] for r in rounds
    )
    return row | {"rounds": rounds}


def write(rows: list[dict[str, Any]], threads: int) -> None:
    about = {"threads": threads, "prompt": PROMPT, "answer": ANSWER, "load": os.getloadavg()}
    text = [
        f"SmolLM2-135M on {threads} threads, {PROMPT} tokens of prompt and {ANSWER} of answer;",
        "tokens a second, medians of alternating rounds (bench/decode.py); bytes are the files'",
        "for llama.cpp and the weights' for Pliant. Activations in 8 bits on both sides",
        "(PLIANT_NATIVE=int8 for ours); the last columns are our default, activations in 16 bits.",
        "",
        "| size | MiB llama.cpp | MiB Pliant | decode llama.cpp | decode Pliant | ratio "
        "| prefill llama.cpp | prefill Pliant | ratio | decode, default | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["type"], row["llama_bytes"] / 2**20, row["pliant_bytes"] / 2**20]
        for kind in ("decode", "prefill"):
            cells += [row[f"llama_{kind}"], row[f"pliant_{kind}"], row[f"{kind}_ratio"]]
        cells += [row["default_decode"], row["default_ratio"]]
        shown = [c if isinstance(c, str) else f"{c:.2f}" if c < 10 else f"{c:.0f}" for c in cells]
        text.append(f"| {' | '.join(shown)} |")
    (RESULTS / "decode_cpu.json").write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    (RESULTS / "decode_cpu.md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
