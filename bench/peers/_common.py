"""What the peer scripts share: arguments, the checkpoint's linear layers, the two output files.

A peer script never imports pliant and runs with the peer's own Python:

    python bench/peers/NAME.py --list
    python bench/peers/NAME.py SOURCE_DIR IDS OUT_DIR --point POINT

It writes OUT_DIR/weights.safetensors (the dequantized weight of every tensor that the peer
changed, under Hugging Face names) and OUT_DIR/point.json. A point that cannot be made ends the
script with one line of reason and a nonzero exit status.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Scripts are named after the packages that they drive, and packages look for each other by name:
# none of them may find this folder.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]

import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

GROUP = 64  # divides 576 and 1536 alike; 128 does not divide 576


class CannotMake(Exception):
    """This point does not exist for this peer on this machine; the message says why."""


@dataclass(frozen=True)
class Job:
    """One point to make."""

    source: Path
    ids: Path
    point: str
    options: Mapping[str, Any]
    work: Path  # scratch directory, removed afterwards

    def calibration(self) -> torch.Tensor:  # [n, length] int64
        return load_file(self.ids)["ids"]


@dataclass(frozen=True)
class Result:
    """What a peer made of a checkpoint."""

    weights: Mapping[str, torch.Tensor]  # dequantized, by Hugging Face name
    linear_bytes: int  # every stored byte of the linear layers, padding included
    note: str = ""
    outer_bytes: int | None = None  # None: embedding and head were left in 16 bits
    seconds: float | None = None  # None: the whole call is the peer's own work
    saved_at: float | None = None  # time.time() when the peer had written its output


def main(
    package: str,
    points: Mapping[str, Mapping[str, Any]],
    make: Callable[[Job], Result],
    *,
    peer: str | None = None,
    version: str | None = None,
) -> None:
    """Run a peer script: list its points, or make one of them."""
    parser = argparse.ArgumentParser(description=f"Points of {peer or package}.")
    parser.add_argument("--list", action="store_true", help="print the points' names as JSON")
    parser.add_argument("source", nargs="?", type=Path, help="Hugging Face checkpoint directory")
    parser.add_argument("ids", nargs="?", type=Path, help='safetensors with "ids" [n, length]')
    parser.add_argument("out", nargs="?", type=Path, help="directory for the two files")
    parser.add_argument("--point")
    arguments = parser.parse_args()
    if arguments.list:
        print(json.dumps(list(points)))
        return
    if arguments.out is None or arguments.point not in points:
        parser.error(f"give SOURCE_DIR IDS OUT_DIR --point, one of {', '.join(points)}")
    try:
        with tempfile.TemporaryDirectory(prefix="peer-") as work:
            options = points[arguments.point]
            job = Job(arguments.source, arguments.ids, arguments.point, options, Path(work))
            started = time.perf_counter()
            result = make(job)
            seconds = result.seconds or time.perf_counter() - started
            used = version or importlib.metadata.version(package)
            write(arguments.out, peer or package, used, job, result, seconds)
    except Exception as error:  # the protocol wants one line whatever went wrong in the peer
        reason = " ".join(str(error).split())[:300]
        sys.exit(f"{arguments.point}: {type(error).__name__}: {reason}")


def write(out: Path, peer: str, version: str, job: Job, result: Result, seconds: float) -> None:
    """Write weights.safetensors (fp16) and point.json, after a check that nothing overflowed."""
    shapes = dict(tensors(job.source))
    weights = {}
    for name, weight in result.weights.items():
        if tuple(weight.shape) != shapes.get(name):
            raise CannotMake(f"{name} has shape {tuple(weight.shape)}, not {shapes.get(name)}")
        weights[name] = weight.detach().to("cpu", torch.float16).contiguous()
        if not weights[name].isfinite().all():
            raise CannotMake(f"{name} is not finite in 16 bits")
    missing = set(linear_names(job.source)) - set(weights)
    if missing:
        raise CannotMake(f"{len(missing)} linear layers were left out, {min(missing)} among them")
    out.mkdir(parents=True, exist_ok=True)
    save_file(weights, out / "weights.safetensors")
    outer, other = outer_and_other_bytes(job.source)
    values = {
        "peer": peer,
        "version": version,
        "point": job.point,
        "options": dict(job.options),
        "linear_bytes": result.linear_bytes,
        "outer_bytes": outer if result.outer_bytes is None else result.outer_bytes,
        "other_bytes": other,
        "seconds": round(seconds, 1),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "note": result.note,
        **({} if result.saved_at is None else {"saved_at": result.saved_at}),
    }
    (out / "point.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def shards(source: Path) -> list[Path]:
    found = sorted(source.glob("*.safetensors"))
    if not found:
        raise CannotMake(f"{source} has no safetensors")
    return found


def tensors(source: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of all tensors of a checkpoint."""
    for shard in shards(source):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (a safe_open is not a mapping)
                yield name, tuple(file.get_slice(name).get_shape())


def linear_names(source: Path) -> list[str]:
    """Weights of the linear layers inside the transformer blocks."""
    return [n for n, s in tensors(source) if len(s) == 2 and ".layers." in n]


def linears(source: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The linear layers' weights, [out, in], as stored."""
    wanted = set(linear_names(source))
    for shard in shards(source):
        with safe_open(shard, framework="pt") as file:
            for name in sorted(wanted & set(file.keys())):
                yield name, file.get_tensor(name)


def outer_and_other_bytes(source: Path) -> tuple[int, int]:
    """Bytes in 16 bits of embedding and head (once if tied), and of everything else."""
    tied = json.loads((source / "config.json").read_text()).get("tie_word_embeddings", False)
    inner, outer, other = set(linear_names(source)), 0, 0
    for name, shape in tensors(source):
        size = 2 * torch.Size(shape).numel()
        if name in inner or (tied and name == "lm_head.weight"):
            continue
        if len(shape) == 2:
            outer += size
        else:
            other += size
    return outer, other


def stored_bytes(saved: Path, prefixes: set[str]) -> dict[str, int]:
    """Bytes in a saved quantized checkpoint of each kind of tensor that belongs to a linear layer.

    prefixes are module names; the kind is what follows the module's name ("qweight", "scales").
    """
    kinds: dict[str, int] = {}
    for shard in shards(saved):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                module, _, kind = name.rpartition(".")
                if module in prefixes:
                    size = file.get_tensor(name).nbytes
                    kinds[kind] = kinds.get(kind, 0) + size
    return kinds


def per_kind(kinds: Mapping[str, int]) -> str:
    """Bytes by kind of stored tensor, for a note."""
    return "stored bytes: " + ", ".join(f"{kind} {size}" for kind, size in sorted(kinds.items()))


def modules(source: Path) -> set[str]:
    """Module names of the linear layers."""
    return {name.removesuffix(".weight") for name in linear_names(source)}


def unpack_gptq(saved: Path, names: set[str], bits: int, *, offset: int) -> dict[str, torch.Tensor]:
    """Dequantize the layers of a checkpoint in GPTQ's layout, by Hugging Face name.

    qweight [in * bits / 32, out] int32 and qzeros [groups, out * bits / 32] int32 hold integers
    packed from the low bits up, across words at 3 bits; scales [groups, out]. The stored zero point
    is the real one less offset (GPTQ's first format subtracts 1).
    """
    found = {}
    for shard in shards(saved):
        for name, tensor in load_file(shard).items():
            module, _, kind = name.rpartition(".")
            if module in names:
                found[module, kind] = tensor
    weights = {}
    for module in names:
        scales = found[module, "scales"].float()  # [groups, out]
        codes = unpack_words(found[module, "qweight"], bits)  # [in, out]
        zeros = unpack_words(found[module, "qzeros"].T, bits).T  # [groups, out]
        zeros = (zeros + offset) & ((1 << bits) - 1) if offset else zeros
        order = found.get((module, "g_idx"))
        if order is None:
            order = torch.arange(codes.shape[0]) // (codes.shape[0] // scales.shape[0])
        order = order.long()
        weights[f"{module}.weight"] = ((codes - zeros[order]) * scales[order]).T
    return weights


def unpack_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """[n, m] int32 to [n * 32 // bits, m] integers, a stream of bits down each column."""
    shifts = torch.arange(32).view(1, 32, 1)
    stream = ((words.long().unsqueeze(1) >> shifts) & 1).reshape(-1, words.shape[1])  # [n * 32, m]
    count = stream.shape[0] // bits
    places = (1 << torch.arange(bits)).view(1, bits, 1)
    return (stream[: count * bits].view(count, bits, -1) * places).sum(1)
