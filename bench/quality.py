"""Ours against peers at the bytes of each peer's output, on a real model.

    python bench/quality.py --text wikitext2-test.txt [--model DIR] [--original] [--peers a,b]
                            [--python PEER=INTERPRETER] [--ours DIR] --work DIR

The model is a copy of SmolLM2 whose 4-bit grid is broken without changing its function (regrid.py
says how and why) or any Hugging Face directory; --original adds the copy as it ships. Every peer is
a script in bench/peers (quality_peers.py has the protocol) and calibrates on the same 128 windows
of 512 tokens from the text's last 30%; ours calibrates on the text of the same windows. Damage is
measured on the text's first 60% (second half of each window scored) and on four kinds of text that
calibration never saw (texts.py). Two comparisons, always at the peer's bytes or fewer:

    total    everything that is loaded: linear layers with scales and codebooks, embedding and
             head (tied ones once), norms; against one artifact of ours opened at that size
    linear   the linear layers alone, embedding and head as they were on both sides; against the
             linear layers of the same artifact

Every row is kept in WORK/rows.json as it is measured, and a run that was interrupted goes on. Ours
can be measured on another machine: --ours-only --sizes WORK/sizes.json --ids WORK/ids.safetensors
makes rows there that --merge takes over here. What another machine needs for that, without a peer:

    python bench/quality.py --text T --original --peers none --peers-only
                            --merge bench/results/quality.json --work DIR --results DIR/again
"""

from __future__ import annotations

import argparse
import fcntl
import fnmatch
import hashlib
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from safetensors.torch import load_file, save_file
from torch import Tensor

from ladder_vs_uniform import regridded_smollm2, said
from pliant.api import opened as opened_model
from pliant.fit import default_recipe, fit
from pliant.measure import Reference
from pliant.model import Checkpoint, open_checkpoint
from pliant.observe import choose_windows, load_text, split, windows
from quality_ours import Ours
from quality_peers import Peer, PeerError, Substitution, known_peers, parse_pythons
from quality_rows import COMPARISONS, Row, Rows, Sizes, read_sizes, write_sizes
from quality_table import write_results
from texts import KINDS, kind_windows, spread

CALIBRATION_WINDOWS = 128


def main() -> None:
    arguments = parsed()
    work = Path(arguments.work)
    peers = [Peer(name, arguments.pythons.get(name, sys.executable), work / "peers" / name)
             for name in arguments.peers]  # fmt: skip
    if arguments.list:
        for peer in peers:
            try:
                print(peer.name, *peer.points(), sep="\n    ")
            except PeerError as error:
                print(f"{peer.name}: {error}")
        return
    work.mkdir(parents=True, exist_ok=True)
    with locked(work):
        run(arguments, peers, work)


def run(arguments: Any, peers: list[Peer], work: Path) -> None:
    copies = {"regridded" if arguments.model is None else Path(arguments.model).name:
              open_checkpoint(arguments.model or regridded_smollm2())}  # fmt: skip
    if arguments.original:
        copies["original"] = open_checkpoint("smollm2")
    ids = measured_ids(arguments, next(iter(copies.values())), work)
    rows = Rows(work / "rows.json", settings(ids))
    for path in arguments.merge:
        rows.merge(Path(path))
    rows.save()
    for name, checkpoint in copies.items():
        bench = Bench(name, checkpoint, ids, rows, arguments, work)
        if not arguments.ours_only:
            bench.calibration()
            for peer in peers:
                bench.measure_peer(peer)
            write_sizes(work / "sizes.json", rows)
        sizes = read_sizes(Path(arguments.sizes or work / "sizes.json"))
        if not arguments.peers_only:
            for comparison in arguments.comparisons:
                bench.measure_ours(comparison, sizes)
    if not arguments.ours_only:
        write_results(rows, arguments.results, command_line())


@dataclass
class Bench:
    """One copy of the model and everything that is measured on it."""

    copy: str
    checkpoint: Checkpoint
    ids: dict[str, Tensor]
    rows: Rows
    arguments: Any
    work: Path

    def __post_init__(self) -> None:
        self._references: dict[str, Reference] = {}
        self._original: Any = None
        self._substitution: Substitution | None = None

    def measure_peer(self, peer: Peer) -> None:
        try:
            points = peer.points()
        except PeerError as error:
            return self._fail(f"{self.copy}|{peer.name}|*", str(error))
        for point in points:
            key = f"{self.copy}|{peer.name}|{point}"
            known = self.rows.peers.get(key, {})
            wanted = [c for c in self.arguments.comparisons if self._texts(c, known.get(c, {}))]
            chosen = fnmatch.fnmatchcase(f"{peer.name}/{point}", self.arguments.points)
            if not wanted or not chosen or (key in self.rows.failed and not self.arguments.retry):
                continue
            out = self.work / "points" / self.copy / peer.name / point
            try:
                print(f"{key}: making", flush=True)
                made = peer.make(point, self.checkpoint.directory, self.calibration(), out)
                self._measure_point(key, made, out / "weights.safetensors", wanted)
            except PeerError as error:
                self._fail(key, str(error))
            if self.arguments.discard:
                shutil.rmtree(out, ignore_errors=True)
        return None

    def measure_ours(self, comparison: str, sizes: Sizes) -> None:
        stem = f"{self.copy}|{comparison}|{self.arguments.effort}"
        wanted = {size: f"{stem}|{size}" for size in sizes.get(self.copy, {}).get(comparison, [])}
        known = {key: self.rows.ours.get(key, {}) for key in wanted.values()}
        wanted = {
            size: key
            for size, key in wanted.items()
            if "smallest_bytes" not in known[key] and self._texts(comparison, known[key])
        }
        if not wanted:
            return
        artifact = self._artifact()
        ours = Ours(artifact, comparison, self.checkpoint, self.arguments.device)
        for size, key in wanted.items():
            found = known[key]
            if size < ours.ladder.smallest_bytes:
                found["smallest_bytes"] = ours.ladder.smallest_bytes
            else:
                found["bytes"] = ours.go_to(size)
                self._measure(ours.model, key, comparison, found)
            self.rows.ours[key] = found
            self.rows.save()

    def _measure_point(self, key: str, made: Row, file: Path, wanted: list[str]) -> None:
        if self._substitution is None:
            self._substitution = Substitution(self._opened())
        inner, changed = self._substitution.changes(file)
        numbers = sum(
            p.numel() for n, p in self._substitution.model.named_parameters()
            if p.dim() > 1 and n not in self._substitution.outer
        )  # fmt: skip
        row = self.rows.peers.get(key, {}) | made | {"bits": 8 * made["linear_bytes"] / numbers}
        for comparison in wanted:
            if comparison == "linear" and "total" in row and len(inner) == len(changed):
                row[comparison] = row["total"]  # embedding and head untouched: the same model
            else:
                model = self._substitution.put(inner if comparison == "linear" else changed)
                found = row.setdefault(comparison, {})
                self._measure(model, f"{key} {comparison}", comparison, found)
            self.rows.peers[key] = row
            self.rows.failed.pop(key, None)
            self.rows.save()

    def _texts(self, comparison: str, known: Row) -> list[str]:
        """Texts still to be measured: the other kinds are for the comparison of everything."""
        if "kl" not in known:
            return list(self.ids) if comparison == "total" else ["wikitext"]
        had = {"wikitext", *known.get("kinds", ())}
        return [text for text in self.ids if comparison == "total" and text not in had]

    def _measure(self, model: Any, told: str, comparison: str, found: Row) -> None:
        for text in self._texts(comparison, found):
            damage = self._reference(text).damage(model).as_dict()
            if text == "wikitext":
                found |= damage
            else:
                found.setdefault("kinds", {})[text] = damage
            print(f"{told}, {text}: KL {damage['kl']:.4f}  ppl {damage['perplexity']:.2f}  "
                  f"top-1 {damage['top1']:.3f}", flush=True)  # fmt: skip

    def _reference(self, kind: str) -> Reference:
        if kind not in self._references:
            if self._original is None:
                self._original = self._opened()
            # Hidden states are kept on disk for the CPU only: another device rounds differently.
            key = self.checkpoint.fingerprint() if self.arguments.device == "cpu" else None
            self._references[kind] = Reference.of(self._original, self.ids[kind], key=key)
        return self._references[kind]

    def _artifact(self) -> Path:
        if self.arguments.ours:
            return Path(self.arguments.ours)
        out = self.work / "ours" / f"{self.copy}-{self.arguments.effort}"
        if not out.exists():
            recipe = default_recipe(
                self.arguments.effort,
                text=str(self.calibration().with_suffix(".txt")),
                gpu=self.arguments.device == "cuda",
            )
            print(f"{out.name}: fitting", flush=True)
            memory = self.checkpoint.nbytes * 9 // 10  # the original itself must not fit
            fit(
                self.checkpoint.directory, memory, out, context=512, recipe=recipe,
                device=self.arguments.device, progress=said,
            )  # fmt: skip
        return out

    def calibration(self) -> Path:
        """The token ids that every peer calibrates on; their text is beside them, for ours."""
        path = self.work / "calibration.safetensors"
        if not path.exists():
            tokenizer = self.checkpoint.tokenizer()
            found = windows(split(load_text(self.arguments.text), "calibration"), tokenizer)
            chosen = choose_windows(found, self.arguments.calibration_windows, seed=0)
            text = "".join(tokenizer.decode(row) for row in chosen)
            path.with_suffix(".txt").write_text(text, encoding="utf-8")
            save_file({"ids": chosen.contiguous()}, path)
        return path

    def _opened(self) -> Any:
        return opened_model(self.checkpoint).to(self.arguments.device)

    def _fail(self, key: str, reason: str) -> None:
        print(f"{key}: {reason}", flush=True)
        self.rows.failed[key] = reason
        self.rows.save()


@contextmanager
def locked(work: Path) -> Iterator[None]:
    """Two runs in one directory would lose each other's rows."""
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SystemExit(f"another run writes to {work}; wait, or use another --work") from None
        yield


def measured_ids(arguments: Any, checkpoint: Checkpoint, work: Path) -> dict[str, Tensor]:
    """Windows [n, 512] of each text, as --ids gives them or cut here, kept in WORK."""
    if arguments.ids:
        return dict(sorted(load_file(arguments.ids).items(), reverse=True))
    tokenizer = checkpoint.tokenizer()
    found = windows(split(load_text(arguments.text), "evaluation"), tokenizer)
    count = min(arguments.windows, len(found))
    ids = {"wikitext": spread(found, count)}
    for kind in arguments.kinds:
        ids[kind] = kind_windows(kind, tokenizer, arguments.kind_windows)
    save_file({name: tensor.contiguous() for name, tensor in ids.items()}, work / "ids.safetensors")
    return ids


def settings(ids: dict[str, Tensor]) -> dict[str, Any]:
    """What makes rows comparable: the tokens that they were measured on."""
    return {
        name: [*tensor.shape, hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16]]
        for name, tensor in sorted(ids.items())
    }


def command_line() -> str:
    """The command without places of this machine."""
    kept = [Path(a).name if "/" in a and "=" not in a else a for a in sys.argv[1:]]
    return f"python bench/quality.py {shlex.join(kept)}"


def parsed() -> Any:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--text", help="WikiText-2's raw test split")
    parser.add_argument("--model", help="Hugging Face directory; default: regridded SmolLM2")
    parser.add_argument("--original", action="store_true", help="SmolLM2 as it ships as well")
    parser.add_argument("--work", default="quality-work", help="rows, builds and artifacts")
    parser.add_argument("--results", default=str(Path(__file__).parent / "results" / "quality"))
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--kinds", default=",".join(KINDS), help="other texts, or none")
    parser.add_argument("--kind-windows", type=int, default=16)
    parser.add_argument("--calibration-windows", type=int, default=CALIBRATION_WINDOWS)
    parser.add_argument("--peers", default=",".join(known_peers()))
    parser.add_argument("--points", default="*", help="shell pattern of PEER/POINT")
    parser.add_argument("--python", action="append", default=[], metavar="PEER=INTERPRETER")
    parser.add_argument("--comparisons", default=",".join(COMPARISONS))
    parser.add_argument("--list", action="store_true", help="print every peer's points")
    parser.add_argument("--retry", action="store_true", help="make failed points again")
    parser.add_argument("--discard", action="store_true", help="delete a point's weights at once")
    parser.add_argument("--ours", help="an artifact of ours")
    parser.add_argument("--effort", default="balanced", help="of the artifacts, made when absent")
    parser.add_argument("--device", default="cpu", help="where damage is measured")
    parser.add_argument("--peers-only", action="store_true")
    parser.add_argument("--ours-only", action="store_true", help="rows for another run to merge")
    parser.add_argument("--sizes", help="WORK/sizes.json of the run that measured the peers")
    parser.add_argument("--ids", help="WORK/ids.safetensors of that run")
    parser.add_argument("--merge", action="append", default=[], help="rows.json of another run")
    arguments = parser.parse_args()
    for name in ("kinds", "peers", "comparisons"):
        given = getattr(arguments, name)
        setattr(arguments, name, [part for part in given.split(",") if part and part != "none"])
    unknown = {*arguments.peers} - {*known_peers()} | {*arguments.kinds} - {*KINDS}
    if unknown or {*arguments.comparisons} - {*COMPARISONS}:
        parser.error(f"there is no {', '.join(sorted(unknown)) or 'such comparison'}")
    if not (arguments.text or arguments.list or arguments.ids):
        parser.error("--text is needed")
    if arguments.ours_only and not arguments.sizes:
        parser.error("--ours-only needs --sizes, as the run that measured the peers wrote them")
    arguments.pythons = parse_pythons(arguments.python)
    return arguments


if __name__ == "__main__":
    main()
