"""Every method of the catalog on a real model: bytes and damage, all linear layers alike.

    python bench/methods.py --text wikitext2-test.txt [--windows 12] [--sequences 8]

Same copy of SmolLM2, same calibration windows (last 30% of the text), same evaluation windows
(first 60%, second half scored) for all; embedding and head are left as they are. Writes
docs/methods.md. Rows next to each other show what a paper's idea adds to the row before it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from ladder_vs_uniform import regridded_smollm2
from pliant.api import opened as opened_model
from pliant.codes import Code, Dense
from pliant.fit.recipe import RungSpec
from pliant.measure import Reference
from pliant.methods import catalog, find
from pliant.model import StreamedModel, coded_model, open_checkpoint
from pliant.observe import Sweep, choose_windows, load_text, split, windows

DOCS = Path(__file__).parent.parent / "docs" / "methods.md"
ROWS: list[tuple[str, dict[str, Any]]] = [
    ("rtn", {"bits": 3, "clip": False}),
    ("rtn", {"bits": 3}),
    ("gptq", {"bits": 3}),
    ("squeezellm", {"bits": 3, "outliers": 0.0, "sensitive": 0.0}),
    ("squeezellm", {"bits": 3}),
    ("lorc", {"base": "rtn", "bits": 3, "rank": 16}),
    ("eora", {"base": "rtn", "bits": 3, "rank": 16}),
    ("eora", {"base": "gptq", "bits": 3, "rank": 16}),
    ("rtn", {"bits": 4, "group_size": 256, "clip": False}),
    ("super_weight", {"bits": 4, "group_size": 256}),
    ("rtn", {"bits": 8, "group_size": 0, "symmetric": True, "clip": False}),
    ("llm_int8", {}),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", required=True, help="WikiText-2's raw test split")
    parser.add_argument("--model", default=None)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--sequences", type=int, default=8)
    arguments = parser.parse_args()
    source = Path(arguments.model) if arguments.model else regridded_smollm2()
    checkpoint = open_checkpoint(source)
    tokenizer, text = checkpoint.tokenizer(), load_text(arguments.text)
    ids = choose_windows(windows(split(text, "calibration"), tokenizer), arguments.sequences)
    found = windows(split(text, "evaluation"), tokenizer)
    chosen = found[torch.linspace(0, len(found) - 1, arguments.windows).long()]
    model = StreamedModel(checkpoint, resident=True)
    reference = Reference.of(opened_model(checkpoint), chosen, key=checkpoint.fingerprint())
    numbers = sum(t.shape[0] * t.shape[1] for t in model.targets if t.block is not None)
    lines = []
    for (name, options), codes in zip(ROWS, build(model, ids), strict=True):
        size = sum(code.nbytes for code in codes.values())
        codes |= {t.name: Dense(model.weight(t)) for t in model.targets if t.block is None}
        compared = coded_model(checkpoint.directory, codes, dict(model.others()))
        damage = reference.damage(compared)
        codes.clear()
        low, high = damage.kl_ci95
        asked = ", ".join(f"{k}={v}" for k, v in options.items())
        lines.append(
            f"| {name} | {asked} | {8 * size / numbers:.3f} | {damage.kl:.4f} | "
            f"{low:.4f} to {high:.4f} | {damage.perplexity:.2f} | {damage.top1:.3f} |"
        )
        print(lines[-1], flush=True)
    write(lines, arguments, source.name)


def build(model: StreamedModel, ids: torch.Tensor) -> list[dict[str, Code]]:
    """The codes of every linear layer for each row, from one pass of observation."""
    codes: list[dict[str, Code]] = [{} for _ in ROWS]
    specs = [RungSpec(method=name, options=options) for name, options in ROWS]
    needs = frozenset().union(*(spec.needs() for spec in specs))
    wanted = {t.name: needs for t in model.targets if t.block is not None}
    with tempfile.TemporaryDirectory() as scratch:
        sweep = Sweep(model, ids, Path(scratch), needs=wanted)
        sweep.forward()
        _, gradient = sweep.outer()
        for index in reversed(range(len(model.blocks))):
            seen, gradient = sweep.block(index, gradient)
            for observation in seen:
                weight = model.weight(observation.target)
                for (name, options), own in zip(ROWS, codes, strict=True):
                    function = find(name).function
                    own[observation.target.name] = function(
                        weight, observation.statistics, **options
                    )
            print(f"layer {index}", file=sys.stderr, flush=True)
    return codes


def write(lines: list[str], arguments: Any, model: str) -> None:
    head = [
        "# Methods",
        "",
        "`pliant methods` lists them with their options. A recipe names them (docs/guide.md).",
        "",
        "| method | kind | paper | needs |",
        "|---|---|---|---|",
        *(
            f"| {info.name} | {info.kind} | {info.paper} | {', '.join(info.needs) or 'nothing'} |"
            for info in catalog().values()
        ),
        "",
        f"## Measured: {model}, all linear layers alike",
        "",
        f"`python bench/methods.py --text wikitext2-test.txt --windows {arguments.windows} "
        f"--sequences {arguments.sequences}`",
        "",
        "Bits count integers, scales, zero points, codebooks, factors and indices. Second moments",
        "are weighted by the likelihood's gradient for every method that uses them.",
        "",
        "| method | options | bits | KL (nats/token) | 95% interval | perplexity | top-1 |",
        "|---|---|---|---|---|---|---|",
    ]
    DOCS.write_text("\n".join([*head, *lines]) + "\n")


if __name__ == "__main__":
    main()
