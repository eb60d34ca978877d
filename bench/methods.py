"""Every method of the catalog on a real model: bytes, damage, time, and GPTQ at the same bytes.

    python bench/methods.py --text wikitext2-test.txt [--windows 12] [--sequences 8]
                            [--device cuda] [--only PART] [--work DIR]

All linear layers alike; embedding and head are left as they are. Same copy of SmolLM2, same
calibration windows (last 30% of the text), same evaluation windows (first 60%, second half scored)
for all. GPTQ is measured at ten sizes; between them its damage is interpolated, the logarithm over
bits. Rows that were measured are kept in --work and not measured again. Writes docs/methods.md.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from ladder_vs_uniform import regridded_smollm2
from methods_rows import CURVE, ROWS, Row
from observing import build_all, linear_numbers, linear_observations
from pliant.api import opened as opened_model
from pliant.codes import Dense
from pliant.errors import PliantError
from pliant.fit.recipe import RungSpec
from pliant.measure import Reference
from pliant.methods import catalog, find
from pliant.model import StreamedModel, coded_model, open_checkpoint
from pliant.observe import Observation, choose_windows, load_text, split, windows

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs" / "methods.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", required=True, help="WikiText-2's raw test split")
    parser.add_argument("--model", default=None)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--only", default="", help="rows whose name contains one of these, comma-separated"
    )
    parser.add_argument("--work", default=str(HERE / "results"), help="keeps methods.json")
    arguments = parser.parse_args()
    source = Path(arguments.model) if arguments.model else regridded_smollm2()
    bench = Bench(source, arguments)
    for row in (*CURVE, *ROWS):
        if (
            any(part in row.label for part in arguments.only.split(","))
            and row.key not in bench.known
        ):
            bench.measure(row)
    write(bench.known, arguments, source.name)


class Bench:
    """The model, what was observed of it, and the rows that are known."""

    def __init__(self, source: Path, arguments: Any) -> None:
        self._checkpoint = open_checkpoint(source)
        tokenizer, text = self._checkpoint.tokenizer(), load_text(arguments.text)
        calibration = windows(split(text, "calibration"), tokenizer)
        self._ids = choose_windows(calibration, arguments.sequences)
        found = windows(split(text, "evaluation"), tokenizer)
        chosen = found[torch.linspace(0, len(found) - 1, arguments.windows).long()]
        self._device = arguments.device
        self._model = StreamedModel(self._checkpoint, resident=True, device=self._device)
        original = opened_model(self._checkpoint).to(self._device)
        self._reference = Reference.of(original, chosen, key=self._checkpoint.fingerprint())
        self._numbers = linear_numbers(self._model)
        self._seen: list[Observation] | None = None
        self._path = Path(arguments.work) / "methods.json"
        self.known: dict[str, dict[str, Any]] = (
            json.loads(self._path.read_text()) if self._path.exists() else {}
        )

    def measure(self, row: Row) -> None:
        """Build every linear layer by one row's method and measure the model."""
        function = find(row.method).function

        def build(weight: torch.Tensor, seen: Observation) -> Any:
            return function(weight, seen.statistics, **row.options)

        observations = self._observations()
        started = time.monotonic()
        try:
            codes = build_all(self._model, observations, build)
        except PliantError as error:
            print(f"{row.label}: {error}", flush=True)
            return
        seconds = time.monotonic() - started
        size = sum(code.nbytes for code in codes.values())
        for target in self._model.targets:
            if target.block is None:
                codes[target.name] = Dense(self._model.weight(target))
        dense = {name: Dense(code.decode()) for name, code in codes.items()}
        others = dict(self._model.others())
        compared = coded_model(self._checkpoint.directory, dense, others).to(self._device)
        with row.activations(self._model.targets, compared):
            damage = self._reference.damage(compared)
        self.known[row.key] = {
            "section": row.section, "label": row.label, "options": row.options,
            "bits": 8 * size / self._numbers, "seconds": seconds, **damage.as_dict(),
        }  # fmt: skip
        self._path.write_text(json.dumps(self.known, indent=1) + "\n")
        print(
            f"{row.label:28s} {row.asked:60s} {8 * size / self._numbers:.3f} bits  "
            f"KL {damage.kl:.4f}  {seconds:.0f} s",
            flush=True,
        )

    def _observations(self) -> list[Observation]:
        if self._seen is None:
            specs = [RungSpec(method=row.method, options=row.options) for row in (*CURVE, *ROWS)]
            needs = frozenset().union(*(spec.needs() for spec in specs))
            self._seen = list(linear_observations(self._model, self._ids, needs))
        return self._seen


def gptq_at(known: dict[str, dict[str, Any]], bits: float) -> float | None:
    """GPTQ's damage at so many bits, between its measured sizes; None outside them."""
    curve = sorted((known[row.key]["bits"], known[row.key]["kl"]) for row in CURVE
                   if row.key in known)  # fmt: skip
    for (low, worse), (high, better) in pairwise(curve):
        if low <= bits <= high:
            share = (bits - low) / (high - low)
            return math.exp((1 - share) * math.log(worse) + share * math.log(better))
    return None


def write(known: dict[str, dict[str, Any]], arguments: Any, model: str) -> None:
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else "two CPU cores"
    lines = [
        "# Methods",
        "",
        "`pliant methods` lists them with their options. A recipe names them (docs/guide.md).",
        "docs/choosing.md says which to use when.",
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
        f"--sequences {arguments.sequences}`, on {device}.",
        "",
        "Bits count integers, scales, zero points, codebooks, factors and indices. Second moments",
        "are weighted by the likelihood's gradient for every method that uses them. The last",
        "column is the damage over that of GPTQ at the same bytes (below 1 is better than GPTQ).",
    ]
    head = (
        "| method | options | bits | KL (nats/token) | 95% interval | perplexity | top-1 | seconds "
        "| of GPTQ's |",
        "|---|---|---|---|---|---|---|---|---|",
    )
    section = None
    for row in (*CURVE, *ROWS):
        found = known.get(row.key)
        if found is None:
            continue
        if row.section != section:
            section = row.section
            lines += ["", f"### {section}", "", *head]
        low, high = found["kl_ci95"]
        gptq = gptq_at(known, found["bits"])
        ratio = "" if gptq is None else f"{found['kl'] / gptq:.2f}"
        lines.append(
            f"| {row.label} | {row.asked} | {found['bits']:.3f} | {found['kl']:.4f} | "
            f"{low:.4f} to {high:.4f} | {found['perplexity']:.2f} | {found['top1']:.3f} | "
            f"{found['seconds']:.0f} | {ratio} |"
        )
    DOCS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
