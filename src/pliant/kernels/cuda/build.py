"""Compiling a kernel for the GPU that is there, once: a shared library kept in a cache directory.

The library holds no torch code: it is called with pointers through ctypes, and compiles in
seconds. PLIANT_KERNEL_CACHE says where it is kept (default: ~/.cache/pliant/kernels).
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

_SOURCE = Path(__file__).with_name("decode.cu")
_LOG = logging.getLogger(__name__)


@cache
def compiler() -> str | None:
    """The path of nvcc: on PATH, under CUDA_HOME, or where Linux installs it."""
    homes = (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
    places = [Path(home, "bin/nvcc") for home in homes if home]
    return shutil.which("nvcc") or next((str(p) for p in places if p.exists()), None)


@cache
def library(bits: int, digits: int, half: bool, terms: bool = False) -> ctypes.CDLL | None:
    """The decode kernel of one width; None, with a line in the log, where it cannot be built.

    digits: of a level, `decode.level_digits`; 0 for GroupInt. half: x is fp16 instead of bf16.
    terms: it also adds what `Terms` holds.
    """
    nvcc = compiler()
    if nvcc is None:
        _say_once("no nvcc: using the Triton kernels")
        return None
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        _say_once("the CUDA kernels need compute capability 8.0 or more")
        return None
    try:
        macros = {"BITS": bits, "LEVELS": digits, "HALF": half, "TERMS": terms}
        return ctypes.CDLL(str(compiled(nvcc, macros, f"{major}{minor}")))
    except (OSError, subprocess.SubprocessError) as error:
        _say_once(f"nvcc could not build the decode kernel ({error}): using the Triton kernels")
        return None


def compiled(nvcc: str, macros: Mapping[str, int], capability: str) -> Path:
    """The shared library, built unless the cache has it."""
    flags = [
        *("-std=c++20", "-O3", "-shared", "-Xcompiler", "-fPIC"),
        f"-gencode=arch=compute_{capability},code=sm_{capability}",
        *(f"-D{name}={int(value)}" for name, value in macros.items()),
    ]
    source = _SOURCE.read_bytes()
    key = hashlib.sha256(source + " ".join(flags).encode()).hexdigest()[:16]
    target = folder() / f"decode-{key}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            fresh = Path(scratch, target.name)
            command = [nvcc, *flags, str(_SOURCE), "-o", str(fresh)]
            subprocess.run(command, check=True, capture_output=True, timeout=600)
            fresh.rename(target)  # another process may have been first: the same file
    return target


def folder() -> Path:
    """Where kernels, and how they are best cut (tuning.py), are kept."""
    return Path(os.environ.get("PLIANT_KERNEL_CACHE", Path.home() / ".cache/pliant/kernels"))


@cache
def _say_once(what: str) -> None:
    _LOG.warning(what)
