"""Running peers: each a script of its own in bench/peers, run with the Python it is installed in.

    NAME.py --list                                  prints a JSON list of points
    NAME.py SOURCE_DIR IDS OUT_DIR --point POINT    writes what the point makes of the checkpoint

SOURCE_DIR is a Hugging Face directory, IDS a safetensors file whose int64 tensor "ids" [n, length]
holds the calibration tokens. OUT_DIR gets weights.safetensors (every tensor that changed,
dequantized, under its Hugging Face name) and point.json (FIELDS). What cannot be made exits
nonzero, and its last line says why. $PEER_WORK names a directory for builds and other things that
its points share.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from pliant.errors import PliantError

PEERS = Path(__file__).parent / "peers"
FIELDS = ("peer", "version", "point", "options", "linear_bytes", "outer_bytes", "other_bytes",
          "seconds", "device", "note")  # fmt: skip
BYTES = ("linear_bytes", "outer_bytes", "other_bytes")


class PeerError(Exception):
    """Why a peer or one of its points is missing, in one line."""


@dataclass(frozen=True)
class Peer:
    """One script. python: the interpreter that its packages are installed in."""

    name: str
    python: str
    work: Path

    def points(self) -> list[str]:
        said = self._run("--list").strip()
        try:
            return [str(name) for name in json.loads(said.splitlines()[-1])]
        except (ValueError, IndexError) as error:
            raise PeerError(f"--list printed no JSON list: {said[-200:]!r}") from error

    def make(self, point: str, source: Path, ids: Path, out: Path) -> dict[str, Any]:
        """Make a point into `out` unless it is there; returns point.json."""
        if not (out / "point.json").exists():
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir(parents=True)
            self._run(str(source), str(ids), str(out), "--point", point)
        try:
            made: dict[str, Any] = json.loads((out / "point.json").read_text())
        except (OSError, ValueError) as error:
            raise PeerError(f"it wrote no point.json that can be read: {error}") from error
        missing = [field for field in FIELDS if field not in made]
        if missing:
            raise PeerError(f"point.json lacks {', '.join(missing)}")
        if not (out / "weights.safetensors").exists():
            raise PeerError("it wrote no weights.safetensors")
        if not all(isinstance(made[field], int) and made[field] > 0 for field in BYTES):
            raise PeerError(f"point.json counts no bytes: {[made[field] for field in BYTES]}")
        return made

    def _run(self, *arguments: str) -> str:
        self.work.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"PEER_WORK": str(self.work.absolute())}
        # What belongs to this interpreter must not be found by another one.
        if self.python != sys.executable:
            environment.pop("PYTHONPATH", None)
        command = [self.python, str(PEERS / f"{self.name}.py"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        (self.work / "last.log").write_text(done.stdout + done.stderr)
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()
            raise PeerError(said[-1][:300])
        return done.stdout


def known_peers() -> list[str]:
    """Names of the scripts that speak the protocol; a leading underscore marks helpers."""
    return sorted(p.stem for p in PEERS.glob("*.py") if not p.stem.startswith("_"))


class Substitution:
    """A model of its own whose parameters can be replaced by a point's, and put back."""

    def __init__(self, model: Any) -> None:
        self.model = model
        named = dict(model.named_parameters(remove_duplicate=False))
        outer = {id(m.weight) for m in self._outer_modules()}
        self.outer = {name for name, parameter in named.items() if id(parameter) in outer}
        self._own = {name: p.detach().cpu().clone() for name, p in model.named_parameters()}
        self._head = next((n for n in self.outer if n not in self._own), None)

    def changes(self, file: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What a point changes: without and with embedding and head. Raises PeerError."""
        changed: dict[str, Tensor] = {}
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118
                tensor = stored.get_tensor(name)
                own = self._own.get(name)
                if own is None and name != self._head:
                    raise PeerError(f"it changed {name}, which the checkpoint does not have")
                if own is not None and own.shape != tensor.shape:
                    raise PeerError(f"{name} has shape {list(tensor.shape)}")
                if not bool(torch.isfinite(tensor.float()).all()):
                    raise PeerError(f"{name} holds NaN or Inf")
                changed[name] = tensor
        inner = {name: tensor for name, tensor in changed.items() if name not in self.outer}
        return inner, changed

    @torch.no_grad()
    def put(self, changed: dict[str, Tensor]) -> Any:
        """The model with these parameters in the place of its own, all others as they were."""
        embedding, head = self._outer_modules()
        if self._head is not None:
            head.weight = embedding.weight
        named = dict(self.model.named_parameters())
        for name, own in self._own.items():
            named[name].copy_(changed.get(name, own))
        if self._head is not None and self._head in changed:  # tied no longer
            head.weight = nn.Parameter(changed[self._head].to(embedding.weight), False)
        return self.model

    def _outer_modules(self) -> tuple[Any, Any]:
        return self.model.get_input_embeddings(), self.model.get_output_embeddings()


def parse_pythons(given: list[str]) -> dict[str, str]:
    """NAME=PATH, several times."""
    found = {}
    for entry in given:
        name, _, path = entry.partition("=")
        if name not in known_peers() or not Path(path).exists():
            raise PliantError(f"--python takes PEER=INTERPRETER, not {entry!r}")
        found[name] = path
    return found
