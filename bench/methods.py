"""Every method of the catalog on a real model: bytes, damage, time, and GPTQ at the same bytes.

    python bench/methods.py --text wikitext2-test.txt [--windows 12] [--sequences 8]
                            [--device cuda] [--only PART] [--work DIR]

All linear layers alike; embedding and head are left as they are. Same copy of SmolLM2, same
calibration windows (last 30% of the text), same evaluation windows (first 60%, second half scored)
for all. GPTQ is measured at eleven sizes; between them its damage is interpolated, the logarithm
over bits. Rows that were measured are kept in WORK/methods.json and not measured again. Writes
docs/methods.md. A row that fails is told and left out; the exit code is then 1.

Several processes can share a GPU: `--shard 0/8 --work A`, `--shard 1/8 --work B` .. measure a part
of the rows each and write no document. `--render-only` with `--merge A/methods.json`, once for each
of them, writes it without a model. `--candidates FILE` holds the texts that calibration text is
chosen from: made where it is missing, which fetches packages, and read on a machine that cannot.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from ladder_vs_uniform import regridded_smollm2
from methods_build import Builder, candidates
from methods_rows import CURVE, ROWS, Row
from methods_table import Known, write
from observing import linear_numbers
from pliant.api import opened as opened_model
from pliant.codes import Dense
from pliant.measure import Reference
from pliant.model import Checkpoint, StreamedModel, coded_model, open_checkpoint
from pliant.observe import digest, load_text, split, windows
from texts import spread

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs" / "methods.md"


def main() -> None:
    arguments = parsed()
    work = Path(arguments.work)
    if arguments.render_only:
        known = Known(work / "methods.json")
        merge(known, arguments.merge)
        write(known, Path(arguments.doc))
        return
    checkpoint = open_checkpoint(arguments.model or regridded_smollm2())
    if arguments.candidates:
        candidates(Path(arguments.candidates), arguments.text, checkpoint.tokenizer)
    chosen = evaluation(checkpoint, arguments)
    known = Known(work / "methods.json", {
        "model": checkpoint.directory.name, "text": digest(chosen),
        "windows": arguments.windows, "sequences": arguments.sequences,
    })  # fmt: skip
    merge(known, arguments.merge)
    missing = [row for row in wanted(arguments.only, arguments.shard) if row.key not in known.rows]
    failed = Bench(checkpoint, chosen, arguments, known, missing).run() if missing else []
    if arguments.shard == (0, 1):
        write(known, Path(arguments.doc))
    if failed:
        sys.exit(f"{len(failed)} of {len(missing)} rows failed: {'; '.join(failed)}")


def parsed() -> Any:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", help="WikiText-2's raw test split")
    parser.add_argument("--model", default=None)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--only", default="", help="rows whose name contains one of these, comma-separated"
    )
    parser.add_argument(
        "--shard", type=parsed_shard, default=(0, 1), metavar="I/N",
        help="of the rows only every Nth, from the Ith, counted from 0",
    )  # fmt: skip
    parser.add_argument("--work", default=str(HERE / "results"), help="keeps methods.json")
    parser.add_argument(
        "--merge", action="append", default=[], metavar="FILE",
        help="methods.json of another run whose rows are taken over",
    )  # fmt: skip
    parser.add_argument("--candidates", default=None, metavar="FILE")
    parser.add_argument("--render-only", action="store_true", help="write the document, no more")
    parser.add_argument("--doc", default=str(DOCS))
    arguments = parser.parse_args()
    if not arguments.text and not arguments.render_only:
        parser.error("--text is needed to measure")
    return arguments


def parsed_shard(text: str) -> tuple[int, int]:
    """(i, n) of "i/n"."""
    index, _, count = text.partition("/")
    try:
        shard = int(index), int(count)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a shard is I/N, as in 0/4, not {text!r}") from None
    if not 0 <= shard[0] < shard[1]:
        raise argparse.ArgumentTypeError(f"a shard I/N has 0 <= I < N, not {text!r}")
    return shard


def wanted(only: str = "", shard: tuple[int, int] = (0, 1)) -> list[Row]:
    """The rows of one shard whose label contains one of the parts of `only`."""
    index, count = shard
    return [
        row for row in (*CURVE, *ROWS)[index::count]
        if any(part in row.label for part in only.split(","))
    ]  # fmt: skip


def merge(known: Known, paths: list[str]) -> None:
    for path in paths:
        known.merge(Path(path))
    known.save()


def evaluation(checkpoint: Checkpoint, arguments: Any) -> torch.Tensor:
    """The windows [n, T] that damage is measured on."""
    found = windows(split(load_text(arguments.text), "evaluation"), checkpoint.tokenizer())
    return spread(found, arguments.windows)


class Bench:
    """The model, the original's side of every measurement, and the rows that are missing."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        chosen: torch.Tensor,
        arguments: Any,
        known: Known,
        missing: list[Row],
    ) -> None:
        self._checkpoint, self._known, self._missing = checkpoint, known, missing
        self._device, self._processes = arguments.device, arguments.shard[1]
        original = opened_model(checkpoint).to(self._device)
        self._reference = Reference.of(original, chosen, key=checkpoint.fingerprint())
        self._model = StreamedModel(checkpoint, resident=True, device=self._device)
        drafts = Path(arguments.candidates or Path(arguments.work) / "candidates.safetensors")
        self._builder = Builder(
            self._model, Path(arguments.text), arguments.sequences, drafts, missing
        )

    def run(self) -> list[str]:
        """Measure what is missing; the labels of rows that failed."""
        failed = []
        for row in self._missing:
            try:
                self._measure(row)
            except Exception as error:  # a row that runs out of memory must not stop the others
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                print(f"{row.key} failed: {reason}", flush=True)
                failed.append(row.key)
                if self._model.device.type == "cuda":
                    torch.cuda.empty_cache()
        return failed

    def _measure(self, row: Row) -> None:
        """Make every linear layer's code as the row says and measure the model."""
        built = self._builder.build(row)
        size = sum(code.nbytes for code in built.codes.values())
        codes = dict(built.codes)
        if row.activations is None:  # decoded once, not in every multiply
            codes = {name: Dense(code.decode()) for name, code in codes.items()}
        for target in self._model.targets:
            if target.block is None:
                codes[target.name] = Dense(self._model.weight(target))
        others = dict(self._model.others())
        compared = coded_model(self._checkpoint.directory, codes, others).to(self._device)
        if row.activations is None:
            damage = self._reference.damage(compared)
        else:
            with row.activations(compared):
                damage = self._reference.damage(compared)
        bits = 8 * size / linear_numbers(self._model)
        self._known.add(row.key, {
            "section": row.section, "label": row.label, "options": row.options,
            "bits": bits, "seconds": built.seconds, "accepted": built.accepted,
            "device": device_name(self._device), "processes": self._processes,
            **damage.as_dict(),
        })  # fmt: skip
        print(
            f"{row.label:28s} {row.asked:60s} {bits:.3f} bits  KL {damage.kl:.4f}  "
            f"{built.seconds:.0f} s",
            flush=True,
        )


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return {1: "one CPU core", 2: "two CPU cores"}.get(threads, f"{threads} CPU cores")


if __name__ == "__main__":
    main()
