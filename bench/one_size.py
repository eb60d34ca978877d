"""One artifact at several sizes against fits made for each of these sizes alone.

    python bench/one_size.py ARTIFACT --against MODEL --text calibration.txt
                             --test wikitext2-test.txt --bits 2.3,3,4 --device cuda --work DIR

A fit for one size alone trains all its steps at that size; recipe, text, seed and number of steps
are otherwise those of the artifact (--steps: of the lone fits). Both are opened at that size and
measured on the first 60% of the test text, 24 windows of 512, the second half of each scored.
Bits are bytes of everything that the ladder holds over its weights. --fit-only BITS makes one lone
artifact and stops, so that several can be made side by side.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from ladder_vs_uniform import said
from pliant.api import opened
from pliant.fit import Recipe, fit
from pliant.fit.recipe import Tune
from pliant.ladder import Artifact
from pliant.measure import Reference
from pliant.model import Checkpoint, open_checkpoint
from pliant.observe import load_text, split, windows
from quality_ours import Ours
from texts import spread

RESULTS = Path(__file__).parent / "results"
WITHIN = 1.03
TUNED = ("steps", "batch", "sequences", "prompt", "rate", "rate_fall")


def main() -> None:
    arguments = parsed()
    checkpoint = open_checkpoint(arguments.against)
    if arguments.fit_only is not None:
        alone(checkpoint, arguments.fit_only, arguments)
        return
    text = load_text(arguments.test)
    found = windows(split(text, "evaluation"), checkpoint.tokenizer())
    ids = spread(found, 24)
    reference = Reference.of(opened(checkpoint).to(arguments.device), ids)
    rows = []
    for bits in arguments.bits:
        size = bytes_at(arguments.artifact, bits)
        row: dict[str, Any] = {"bits": bits, "asked": size}
        places = {"ladder": arguments.artifact, "alone": alone(checkpoint, bits, arguments)}
        for name, place in places.items():
            ours = Ours(place, "total", checkpoint, arguments.device)
            row[f"{name}_bytes"] = ours.go_to(size)
            row[name] = reference.damage(ours.model).as_dict()
        row["ratio"] = row["ladder"]["kl"] / row["alone"]["kl"]
        for name, place in places.items():
            tuned = Artifact.open(place).recipe["tune"]
            row[f"{name}_training"] = {option: tuned[option] for option in TUNED}
        rows.append(row)
        print(f"{bits} bits: ladder {row['ladder']['kl']:.4f}, alone {row['alone']['kl']:.4f}, "
              f"ratio {row['ratio']:.3f}", flush=True)  # fmt: skip
    write(rows, arguments)


def bytes_at(directory: Path, bits: float) -> int:
    """Bytes of an artifact's weights, fixed ones included, at so many bits a weight."""
    artifact = Artifact.open(directory)
    numbers = sum(math.prod(target["shape"]) for target in artifact.targets)
    return artifact.ladder.fixed_bytes + int(bits * numbers / 8)


def alone(checkpoint: Checkpoint, bits: float, arguments: Any) -> Path:
    """The artifact whose training was all for one size; made when absent."""
    out = Path(arguments.work) / f"alone-{bits}"
    if not (out / "ladder.json").exists():
        recipe = Recipe.model_validate(Artifact.open(arguments.artifact).recipe)
        text = recipe.calibration.model_copy(update={"text": arguments.text})
        changes: dict[str, Any] = {"bits": (bits, bits)}
        if arguments.steps:
            changes["steps"] = arguments.steps
        tuned = recipe.tune.model_copy(update=changes)
        recipe = recipe.model_copy(update={"calibration": text, "tune": tuned})
        memory = checkpoint.nbytes * 9 // 10  # the original itself must not fit
        fit(checkpoint.directory, memory, out, context=512, recipe=recipe,
            device=arguments.device, progress=said)  # fmt: skip
    return out


def parsed() -> Any:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("artifact", type=Path, help="of effort best")
    parser.add_argument("--against", required=True, help="the original")
    parser.add_argument("--text", required=True, help="what the artifact was calibrated on")
    parser.add_argument("--test", required=True, help="WikiText-2's raw test split")
    parser.add_argument("--bits", default="2.3,3,4")
    parser.add_argument("--steps", type=int, default=0, help="of the lone fits; 0: the recipe's")
    parser.add_argument("--fit-only", type=float, metavar="BITS")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", default="one-size-work")
    arguments = parser.parse_args()
    arguments.bits = [float(part) for part in arguments.bits.split(",")]
    return arguments


def trained(options: dict[str, Any]) -> str:
    rates = Tune(rate=options["rate"], rate_fall=options["rate_fall"])
    rate = ", ".join(f"{1000 * rates.rate_of(bits):g}" for bits in (2, 3, 4))
    prompted = ", prompted" if options["prompt"] else ""
    return f"{options['steps']} x {options['batch']}, {options['sequences']}{prompted}, {rate} e-3"


def write(rows: list[dict[str, Any]], arguments: Any) -> None:
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
    lines = [
        "# One artifact against fits for one size alone",
        "",
        f"`python bench/one_size.py ARTIFACT --against {Path(arguments.against).name} ...` "
        f"on {device}. Target: at most {WITHIN}.",
        "",
        "Training is steps x sequences a step, of how many sequences, rates at 2, 3, 4 bits.",
        "",
        "| bits | ladder's training | ladder KL | 95% interval | alone's training | alone KL "
        "| 95% interval | ratio | ok |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = []
        for name in ("ladder", "alone"):
            low, high = row[name]["kl_ci95"]
            cells += [trained(row[f"{name}_training"]), f"{row[name]['kl']:.4f}"]
            cells.append(f"{low:.4f} to {high:.4f}")
        cells += [f"{row['ratio']:.3f}", "yes" if row["ratio"] <= WITHIN else "no"]
        lines.append(f"| {row['bits']} | {' | '.join(cells)} |")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "one_size.json").write_text(json.dumps(rows, indent=1) + "\n")
    (RESULTS / "one_size.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
