"""What the options of a ladder's training give, from one untrained artifact.

    python bench/training.py --against MODEL --text calibration.txt --test TEST --variants FILE
                             [--bits 2.3,3,4,5] [--device cuda] [--work DIR]

The rungs of effort best are built once, without training (WORK/rough), and its climb stays what it
is for all variants: each trains from the same start and is opened at the same sizes. TEST is the
raw test split of WikiText-2. FILE is a list of {"name": .., options of a recipe's `tune`}; one with
"bits": [3, 3] trains for that size alone. Damage is measured on 24 windows of WikiText, on 24
sequences of the text that was trained on, and on 24 that the model wrote from another seed: what a
variant gains on the second alone it has learned by heart. A variant that is in WORK/training.json
is not run again.
Writes bench/results/training.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from safetensors.torch import load_file, save_file
from torch import Tensor

from ladder_vs_uniform import said
from one_size import bytes_at
from pliant.api import opened
from pliant.codes import Dense
from pliant.fit import default_recipe, fit
from pliant.fit.recipe import Search, Tune
from pliant.fit.training import written
from pliant.fit.tune import tune
from pliant.ladder import Artifact
from pliant.measure import Reference
from pliant.model import Checkpoint, StreamedModel, coded_model, open_checkpoint, swap
from pliant.observe import choose_windows, load_text, split, windows
from texts import spread

RESULTS = Path(__file__).parent / "results"
COUNT, LENGTH, SEED = 24, 512, 7


def main() -> None:
    arguments = parsed()
    work = Path(arguments.work)
    work.mkdir(parents=True, exist_ok=True)
    checkpoint = open_checkpoint(arguments.against)
    artifact = Artifact.open(untrained(checkpoint, arguments, work))
    bench = Bench(checkpoint, artifact, arguments, work)
    kept = work / "training.json"
    rows: list[dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else []
    variants = [
        {"name": "untrained", "steps": 0},
        *json.loads(Path(arguments.variants).read_text()),
    ]
    for variant in variants:
        if all(row["name"] != variant["name"] for row in rows):
            rows.append(bench.row(variant))
            kept.write_text(json.dumps(rows, indent=1) + "\n")
    write(rows, arguments)


def untrained(checkpoint: Checkpoint, arguments: Any, work: Path) -> Path:
    """The artifact that every variant starts from, made when absent."""
    out = work / "rough"
    if not (out / "ladder.json").exists():
        recipe = default_recipe("best", text=arguments.text, gpu=arguments.device == "cuda")
        search = Search(measurements=recipe.search.measurements // 3)  # as `fit` before it trains
        recipe = recipe.model_copy(update={"tune": Tune(), "search": search})
        memory = checkpoint.nbytes * 9 // 10  # the original itself must not fit
        fit(checkpoint.directory, memory, out, context=LENGTH, recipe=recipe,
            device=arguments.device, progress=said)  # fmt: skip
    return out


class Bench:
    """The model, its texts, and the damage of trained rungs."""

    def __init__(
        self, checkpoint: Checkpoint, artifact: Artifact, arguments: Any, work: Path
    ) -> None:
        self._artifact, self._device, self._work = artifact, arguments.device, work
        self._bits = arguments.bits
        self._model = StreamedModel(checkpoint, resident=True, device=self._device)
        tokenizer = checkpoint.tokenizer()
        found = windows(split(load_text(arguments.test), "evaluation"), tokenizer)
        calibration = windows(load_text(arguments.text), tokenizer)
        self._calibration = choose_windows(calibration, min(96, len(calibration)), seed=0)
        texts = {
            "wikitext": spread(found, COUNT),
            # The last of a part begin alike whether or not the first continue a prompt.
            "trained on": self._written(512, SEED, Tune())[-COUNT:],
            "written": self._written(512, SEED + 1000, Tune())[-COUNT:],
        }
        original = opened(checkpoint).to(self._device)
        self._references = {name: Reference.of(original, ids) for name, ids in texts.items()}
        empty = torch.zeros(1)
        codes = {t.name: Dense(empty.expand(t.shape)) for t in self._model.targets}
        self._student = coded_model(
            artifact.config(), codes, artifact.load_fixed()
        ).to(self._device)  # fmt: skip

    def row(self, variant: dict[str, Any]) -> dict[str, Any]:
        """Train as `variant` says and measure at every size."""
        name, settings = variant["name"], Tune(**{k: v for k, v in variant.items() if k != "name"})
        started = time.monotonic()
        tuned = {}
        if settings.steps:
            ids = torch.cat([self._calibration, self._written(settings.sequences, SEED, settings)])
            tuned = tune(
                self._model, self._artifact.ladder, self._artifact.load_code, ids, settings,
                progress=lambda done, of: paced(name, done, of, started),
            )  # fmt: skip
        seconds = time.monotonic() - started
        sizes = {}
        for bits in self._bits:
            size = bytes_at(self._artifact.directory, bits)
            allocation = self._artifact.ladder.allocation(size)
            for target, index in allocation.items():
                code = tuned.get((target, index)) or self._artifact.load_code(target, index)
                swap(self._student, target, Dense(code.to(self._device).decode()))
            sizes[str(bits)] = {
                text: reference.damage(self._student).kl
                for text, reference in self._references.items()
            }
            print(f"{name}: {bits} bits", {k: round(v, 4) for k, v in sizes[str(bits)].items()})
        return {"name": name, "options": variant, "seconds": seconds, "damage": sizes}

    def _written(self, count: int, seed: int, settings: Tune) -> Tensor:
        """Sequences [count, LENGTH] that the model wrote, kept in the work directory."""
        how = (settings.prompt, settings.prompted, settings.temperature)
        kept = self._work / f"text-{'-'.join(map(str, (seed, *how)))}.safetensors"
        have = load_file(kept)["ids"] if kept.exists() else torch.zeros(0, LENGTH).long()
        while len(have) < count:  # in parts of one size, so that more text begins as less does
            at = seed + len(have)
            part = written(self._model, self._calibration, settings, 512, LENGTH, at)
            have = torch.cat([have, part])
            save_file({"ids": have}, kept)
        return have[:count]


def paced(name: str, done: int, of: int, started: float) -> None:
    if done % max(1, of // 10) == 0:
        print(f"  {name}: {done} of {of} steps, {time.monotonic() - started:.0f} s", flush=True)


def parsed() -> Any:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--against", required=True, help="the original")
    parser.add_argument("--text", required=True, help="to calibrate and train on")
    parser.add_argument("--test", required=True, help="WikiText-2's raw test split")
    parser.add_argument("--variants", required=True)
    parser.add_argument("--bits", default="2.3,3,4,5")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", default="training-work")
    arguments = parser.parse_args()
    arguments.bits = [float(part) for part in arguments.bits.split(",")]
    return arguments


def write(rows: list[dict[str, Any]], arguments: Any) -> None:
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
    sizes = [str(bits) for bits in arguments.bits]
    lines = [
        "# What the options of training give",
        "",
        f"`python bench/training.py --against {Path(arguments.against).name} ...` on {device}. "
        "Damage in nats a token",
        "at so many bits a weight: WikiText / text that was trained on / other text of the model.",
        "",
        "| variant | seconds | " + " | ".join(f"{size} bits" for size in sizes) + " |",
        "|---|---|" + "---|" * len(sizes),
    ]
    for row in rows:
        cells = [
            " / ".join(f"{value:.4f}" for value in row["damage"][size].values()) for size in sizes
        ]
        lines.append(f"| {row['name']} | {row['seconds']:.0f} | {' | '.join(cells)} |")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "training.json").write_text(json.dumps(rows, indent=1) + "\n")
    (RESULTS / "training.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
