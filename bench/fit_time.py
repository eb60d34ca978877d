"""Seconds of `pliant fit` (balanced) and of GPTQModel's GPTQ at 4 bits, same model, same GPU.

    python bench/fit_time.py --text wikitext2-test.txt --python INTERPRETER [--layers 16]
                             [--device cuda] [--work DIR] [--effort balanced]

The model is the randomly initialised Llama shape of about a billion parameters of fit_memory.py.
INTERPRETER has GPTQModel installed; it calibrates on 128 windows of 512 tokens of the text, as in
bench/quality.py. Ours reads the same text and chooses what its effort takes. Both times run from
the start of a process until its output is in place: import, load, quantize, save. Before that each
runs once on a model of one layer, so that what is compiled on first use (Triton kernels,
GPTQModel's extensions: it must find nvcc and ninja) is not in the times.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from safetensors.torch import save_file

from fit_memory import write_checkpoint
from pliant.model import open_checkpoint
from pliant.observe import choose_windows, load_text, split, windows

RESULTS = Path(__file__).parent / "results"
PEER = Path(__file__).parent / "peers" / "gptqmodel.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--text", required=True)
    parser.add_argument("--python", required=True, help="an interpreter that has gptqmodel")
    parser.add_argument("--point", default="4b-g64-order", help="of bench/peers/gptqmodel.py")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--effort", default="balanced")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", default=None)
    arguments = parser.parse_args()
    work = Path(arguments.work or tempfile.mkdtemp(prefix="pliant-bench-"))
    source = work / "llama-1b"
    source.mkdir(parents=True, exist_ok=True)
    size = write_checkpoint(source, arguments.layers)
    result: dict[str, Any] = {
        "checkpoint_bytes": size,
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU",
        "effort": arguments.effort, "peer_point": arguments.point,
    }  # fmt: skip
    warm = work / "warm"
    (warm / "llama-1b").mkdir(parents=True, exist_ok=True)
    small = write_checkpoint(warm / "llama-1b", 1)
    ours(arguments, warm / "llama-1b", warm, small)
    peers(arguments, warm / "llama-1b", warm)
    result["ours_seconds"] = ours(arguments, source, work, size)
    result |= peers(arguments, source, work)
    result["ratio"] = result["ours_seconds"] / result["peer_seconds"]
    print(json.dumps(result, indent=1))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "fit_time.json").write_text(json.dumps(result, indent=1) + "\n")


def ours(arguments: Any, source: Path, work: Path, size: int) -> float:
    """Seconds until the process says what it has written."""
    command = [
        sys.executable, "-m", "pliant", "fit", str(source), "--memory", str(size * 2 // 5),
        "--context", "512", "--text", arguments.text, "--effort", arguments.effort,
        "--device", arguments.device, "-o", str(work / "out"), "--overwrite",
    ]  # fmt: skip
    started = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        seconds = time.monotonic() - started
        print(first, *process.stdout, sep="", end="", flush=True)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return seconds


def peers(arguments: Any, source: Path, work: Path) -> dict[str, float]:
    """The peer's process without what the script does after its save, and its own work alone."""
    tokenizer = open_checkpoint(source).tokenizer()
    found = windows(split(load_text(arguments.text), "calibration"), tokenizer)
    save_file({"ids": choose_windows(found, 128, seed=0).contiguous()}, work / "ids.safetensors")
    out = work / "peer"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    started = time.time()
    subprocess.run(
        [arguments.python, str(PEER), str(source), str(work / "ids.safetensors"), str(out),
         "--point", arguments.point],
        check=True, env=environment,
    )  # fmt: skip
    point = json.loads((out / "point.json").read_text())
    return {
        "peer_seconds": point["saved_at"] - started,
        "peer_work_seconds": point["seconds"],
        "peer_version": point["version"],
    }


if __name__ == "__main__":
    main()
