"""llama.cpp built from llama-cpp-python's source distribution: its tools and its quantizers."""

from __future__ import annotations

import ctypes
import math
import os
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

PACKAGE = "llama-cpp-python==0.3.36"
THREADS = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


class Tools:
    """The built programs, and the quantizers of libggml-base."""

    def __init__(self, source: Path, build: Path) -> None:
        self.convert = source / "convert_hf_to_gguf.py"
        self.bin = build / "bin"
        sys.path.insert(0, str(source / "gguf-py"))
        self._ggml: Any = ctypes.CDLL(str(self.bin / "libggml-base.so"))
        self._ggml.ggml_type_name.restype = ctypes.c_char_p
        self._ggml.ggml_row_size.restype = ctypes.c_size_t
        self._ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
        self._ggml.ggml_version.restype = ctypes.c_char_p
        names = (self._ggml.ggml_type_name(i) for i in range(43))
        self._types = {n.decode().upper(): (i, n.decode()) for i, n in enumerate(names) if n}
        self.version = f"ggml {self._ggml.ggml_version().decode()}"

    @classmethod
    def built(cls, work: Path) -> Tools:
        """Fetch and build what is missing."""
        work.mkdir(parents=True, exist_ok=True)
        name, version = PACKAGE.split("==")
        root = work / f"{name.replace('-', '_')}-{version}"
        source, build = root / "vendor" / "llama.cpp", work / "build"
        if not source.exists():
            run([sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", name,
                 "--dest", str(work), PACKAGE])  # fmt: skip
            with tarfile.open(work / f"{root.name}.tar.gz") as archive:
                archive.extractall(work, filter="data")
        if not (build / "bin" / "llama-imatrix").exists():
            off = ("LLAMA_OPENSSL", "LLAMA_BUILD_SERVER", "LLAMA_BUILD_TESTS", "LLAMA_BUILD_APP",
                   "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_UI", "LLAMA_USE_PREBUILT_UI")  # fmt: skip
            run(["cmake", "-S", str(source), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release",
                 "-DBUILD_SHARED_LIBS=ON", *(f"-D{option}=OFF" for option in off)])  # fmt: skip
            run(["cmake", "--build", str(build), "-j", str(THREADS),
                 "--target", "ggml-base", "llama-quantize", "llama-imatrix"])  # fmt: skip
        return cls(source, build)

    def quantized(
        self, weights: dict[str, Any], types: dict[str, str], importance: dict[str, Any]
    ) -> dict[str, Any]:
        """The bytes of each weight [out, in] at its type, importance [in] where there is one.

        The interpreter is free while ggml works, so threads are enough.
        """
        with ThreadPoolExecutor(THREADS) as pool:
            jobs = {
                name: pool.submit(self._quantized, name, weights[name], kind, importance.get(name))
                for name, kind in types.items()
            }
            return {name: job.result() for name, job in jobs.items()}

    def _quantized(self, name: str, weight: Any, kind: str, importance: Any) -> Any:
        import numpy as np

        weight = np.ascontiguousarray(weight)
        rows, width = weight.shape
        number, own = self._types[kind]
        block = self._ggml.ggml_blck_size(number)
        together = math.lcm(width, block) // width
        if rows % together:
            fail(f"{name}: {rows} rows of {width} are no whole number of blocks of {block}")
        wide = width * together
        size = self._ggml.ggml_row_size(number, ctypes.c_int64(wide)) * (rows // together)
        out = np.empty(size, dtype=np.uint8)
        if importance is not None:
            importance = np.ascontiguousarray(np.tile(importance, together), dtype=np.float32)
        written = self._ggml.ggml_quantize_chunk(
            number, pointer(weight), pointer(out), ctypes.c_int64(0),
            ctypes.c_int64(rows // together), ctypes.c_int64(wide), pointer(importance),
        )  # fmt: skip
        if written != size:
            fail(f"{name}: {own} took {written} bytes, not {size}")
        return out

    def dequantized(self, raw: Any, kind: str, shape: tuple[int, ...]) -> Any:
        import numpy as np

        if kind == "F32":
            return raw.view(np.float32).reshape(shape)
        out = np.empty(shape, dtype=np.float32)
        raw = np.ascontiguousarray(raw)
        function = getattr(self._ggml, f"dequantize_row_{self._types[kind][1]}")
        function(pointer(raw), pointer(out), ctypes.c_int64(out.size))
        return out


def pointer(array: Any) -> Any:
    return None if array is None else ctypes.c_void_p(array.ctypes.data)


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    said = done.stdout + done.stderr
    if done.returncode:
        fail(f"{Path(command[0]).name} failed: {(said.strip().splitlines() or ['?'])[-1]}")
    return said


def fail(reason: str) -> None:
    raise SystemExit(reason)
