"""Compiling the native kernels once on a machine, with the compiler that is there."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from pliant.kernels.cpu.structs import SIZES

_SOURCES = Path(__file__).parent / "native"
_FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread",
    "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd",
)  # fmt: skip
_SETS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": (
        "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mfma", "-mf16c",
        "-mprefer-vector-width=512",
    ),
}  # fmt: skip
_TIMEOUT = 300  # seconds for the whole build

log = logging.getLogger(__name__)


@cache
def library() -> ctypes.CDLL | None:
    """The native kernels, compiled if they are not yet; None (said once) when that cannot be.

    PLIANT_NATIVE=0 turns them off. They are kept under $PLIANT_CACHE or ~/.cache/pliant.
    """
    if os.environ.get("PLIANT_NATIVE") == "0":
        return None
    try:
        return _load(_built())
    except (OSError, subprocess.SubprocessError) as error:
        reason = str(error).strip().splitlines()[-1:]
        log.warning("decoding in plain torch, which is slow: %s", *reason or ["no kernels"])
        return None


def _built() -> Path:
    compiler = _compiler()
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=30)
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    sets = _SETS if on_x86 else {"plain": _SETS["plain"]}
    digest = hashlib.sha256(repr((compiler, version.stdout, platform.machine())).encode())
    digest.update(repr((_FLAGS, sets)).encode())
    for source in sorted(_SOURCES.iterdir()):
        digest.update(source.read_bytes())
    root = Path(os.environ.get("PLIANT_CACHE") or Path.home() / ".cache" / "pliant") / "kernels"
    found = root / f"{digest.hexdigest()[:24]}.so"
    if not found.exists():
        log.warning("compiling the native kernels, once on this machine (up to a minute)")
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix="build-") as work:
            made = _compiled(compiler, Path(work), sets)
            os.replace(made, found)  # who builds at the same time writes the same
    return found


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        found = name and shutil.which(name)
        if found:
            return found
    raise OSError("no C++ compiler was found; install one, or set CXX")


def _compiled(compiler: str, work: Path, sets: dict[str, tuple[str, ...]]) -> Path:
    jobs = [[f"-DPLIANT_ISA={name}", *flags, "isa.cpp"] for name, flags in sets.items()]
    jobs += [["main.cpp"], ["pool.cpp"]]
    running, null, pipe = [], subprocess.DEVNULL, subprocess.PIPE
    try:
        for i, job in enumerate(jobs):
            command = [compiler, *_FLAGS, "-w", *job, "-c", "-o", str(work / f"{i}.o")]
            running.append(
                subprocess.Popen(command, cwd=_SOURCES, stdout=null, stderr=pipe, text=True)
            )
        for process in running:
            said = process.communicate(timeout=_TIMEOUT)[1]
            if process.returncode:
                raise OSError(f"the C++ compiler failed: {(said.splitlines() or ['?'])[0]}")
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
                process.wait()
    made = work / "kernels.so"
    objects = [str(work / f"{i}.o") for i in range(len(jobs))]
    subprocess.run(
        [compiler, "-shared", "-pthread", *objects, "-o", str(made)],
        check=True, capture_output=True, timeout=_TIMEOUT,
    )  # fmt: skip
    return made


def _load(path: Path) -> ctypes.CDLL:
    native = ctypes.CDLL(str(path))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    native.pliant_use.restype = ctypes.c_char_p
    native.pliant_use.argtypes = [ctypes.c_int]
    native.pliant_sizes.argtypes = [pointer]
    native.pliant_matmul.argtypes = [pointer, pointer, pointer, number, ctypes.c_int, ctypes.c_int]
    native.pliant_decode.argtypes = [pointer, number, number, pointer, ctypes.c_int]
    native.pliant_shared_floats.argtypes = [pointer]
    native.pliant_shared_floats.restype = number
    native.pliant_step.argtypes = [pointer, number, number, pointer, ctypes.c_int]
    native.pliant_gemm_bytes.argtypes = [number, number]
    native.pliant_gemm_bytes.restype = number
    native.pliant_gemm.argtypes = [pointer, pointer, pointer, number, pointer, ctypes.c_int]
    native.pliant_prompt_bytes.argtypes = [pointer, number]
    native.pliant_prompt_bytes.restype = number
    native.pliant_prompt.argtypes = [
        pointer, pointer, number, number, number, pointer, pointer, pointer, pointer, number,
        ctypes.c_int,
    ]  # fmt: skip
    native.pliant_rows_bytes.argtypes = [pointer, number]
    native.pliant_rows_bytes.restype = number
    native.pliant_rows.argtypes = [
        pointer, pointer, number, number, number, pointer, pointer, ctypes.c_int,
    ]  # fmt: skip
    real, team = ctypes.c_float, ctypes.c_int
    native.pliant_search.argtypes = [
        pointer, number, number, number, pointer, pointer, pointer, number, number, pointer,
        number, real, pointer, pointer, pointer, team,
    ]  # fmt: skip
    block: list[Any] = [pointer, pointer, pointer, *(number,) * 4, pointer, pointer, pointer]
    native.pliant_round_integers.argtypes = [*block, pointer, real, team]
    native.pliant_round_levels.argtypes = [*block, pointer, pointer, pointer, number, team]
    sizes = (number * len(SIZES))()
    native.pliant_sizes(sizes)
    if list(sizes) != SIZES:
        raise OSError(f"{path} lays out its structures otherwise than this Python does")
    return native
