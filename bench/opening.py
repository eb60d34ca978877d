"""Seconds to open an artifact on a device beside those to read the same bytes.

    python bench/opening.py DIR [--device cuda] [--sizes 3] [--rounds 5] [--out FILE]

Opening is `pliant.load`: every byte checked, the model built, everything on the device. Reading is
the bytes of the same rungs, piece by piece in as many threads, copied to the device, not checked.
Both from the page cache (warm), and with the files dropped from it before (cold). A figure is the
median of the rounds, which alternate. Target on a GPU: at most 1.2 times as long.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pliant.ladder import Artifact
from pliant.ladder.artifact import load_threads
from pliant.ladder.live import plan_opening
from pliant.ladder.shard import Extent
from pliant.model import find_device
from pliant.run import load

RESULTS = Path(__file__).parent / "results" / "opening.json"
TARGET = 1.2


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--sizes", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    artifact, device = Artifact.open(given.artifact), find_device(given.device)
    low, high = artifact.ladder.smallest_bytes, artifact.ladder.largest_bytes
    rows = []
    for i in range(given.sizes):
        size = low + (high - low) * i // max(given.sizes - 1, 1)
        for cold in (False, True):
            rows.append(compared(artifact, size, device, cold, given.rounds))
            print(json.dumps(rows[-1]), flush=True)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    found = {"device": name, "artifact": given.artifact.name, "target": TARGET, "rows": rows}
    given.out.write_text(json.dumps(found, indent=1) + "\n")


def compared(
    artifact: Artifact, weights: int, device: torch.device, cold: bool, rounds: int
) -> dict[str, Any]:
    allocation = plan_opening(artifact, weights=weights).allocation
    extents = [artifact.rung(t, i).where for t, i in allocation.items()]
    extents.append(artifact.document.fixed)
    calls: dict[str, Callable[[], Any]] = {
        "open": partial(load, artifact.directory, weights=weights, device=device),
        "read": partial(read, artifact.directory, extents, device),
    }
    taken: dict[str, list[float]] = {name: [] for name in calls}
    calls["open"]()  # imports, libraries
    for _ in range(rounds):
        for name, call in calls.items():
            gc.collect()
            for path in artifact.directory.glob("*.safetensors") if cold else ():
                drop(path)
            began = time.perf_counter()
            kept = call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken[name].append(time.perf_counter() - began)
            del kept
    seconds = {name: statistics.median(times) for name, times in taken.items()}
    nbytes = sum(extent.nbytes for extent in extents)
    return {
        "bytes": nbytes, "cold": cold, "open_seconds": seconds["open"],
        "read_seconds": seconds["read"], "ratio": seconds["open"] / seconds["read"],
        "open_bytes_per_second": nbytes / seconds["open"],
    }  # fmt: skip


def read(directory: Path, extents: list[Extent], device: torch.device) -> list[Tensor]:
    """The bytes of each extent on the device."""

    def one(extent: Extent) -> Tensor:
        buffer = torch.empty(extent.nbytes, dtype=torch.uint8)
        with (directory / extent.shard).open("rb", buffering=0) as file:
            file.seek(extent.start)
            view = memoryview(buffer.numpy())
            done = 0
            while done < extent.nbytes:
                done += file.readinto(view[done:]) or 0
        return buffer.to(device)

    with ThreadPoolExecutor(load_threads(device)) as pool:
        return list(pool.map(one, extents))


def drop(path: Path) -> None:
    """Let the system forget a file that it keeps in memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    main()
