"""llama.cpp's K- and IQ-quants with an importance matrix, built from llama-cpp-python's source.

    python bench/peers/llama_cpp.py --list
    python bench/peers/llama_cpp.py SOURCE_DIR IDS OUT_DIR --point POINT

Three kinds of point:

    pure-TYPE   every linear layer at one type
    mix-FILE    every tensor at the type that llama-quantize would choose for that file type if the
                widths were multiples of 256; it is asked, on a model of such widths (--dry-run).
                mix-FILE-Q8_0: the same with the embedding at Q8_0, as it is at other widths
    file-FILE   the file that llama-quantize writes, with its fallbacks to larger types

llama-quantize refuses blocks of 256 where the width of a matrix is not a multiple of 256. For pure
and mix the matrix is handed to ggml_quantize_chunk as rows of several (four of 576 are nine
blocks), the importance repeated for each. The embedding of a pure point has the type that the file
type of the same name gives it.

The importance matrix holds the mean of the squared inputs of each matrix over the calibration
tokens, computed by transformers (much the faster of the two) and written as llama-imatrix writes
its own; with PEER_IMATRIX=tool llama-imatrix makes it, from the text of the same tokens.

Weights are read from the converted f32 GGUF and mapped back to their Hugging Face names; that the
map gives the checkpoint back is checked for every tensor. Needs cmake, a C++ compiler, torch,
transformers and gguf (the vendored one is used). Sources and builds are kept in $PEER_WORK.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from _ggml import PACKAGE, THREADS, Tools, fail, run
from _importance import collect, collect_by_tool

# Scripts here are named after packages, which transformers must not find instead of those.
sys.path.remove(str(Path(__file__).resolve().parent))

# What is quantized at one type, and the file type whose embedding it gets.
PURE = {"IQ2_XXS": "IQ2_XXS", "IQ2_XS": "IQ2_XS", "IQ2_S": "IQ2_M", "Q2_K": "Q2_K",
        "IQ3_XXS": "IQ3_XXS", "IQ3_S": "IQ3_S", "Q3_K": "Q3_K_S", "IQ4_XS": "IQ4_XS",
        "IQ4_NL": "IQ4_NL", "Q4_K": "Q4_K_S", "Q4_0": "Q4_0", "Q4_1": "Q4_1"}  # fmt: skip
MIXED = ("IQ2_M", "Q2_K", "IQ3_XXS", "IQ3_M", "Q3_K_M", "Q4_K_M")
AS_AT_OTHER_WIDTHS = ("IQ2_M", "Q2_K", "IQ3_XXS", "Q3_K_M")
FILES = ("IQ2_M", "Q2_K", "IQ3_M", "Q3_K_M", "Q4_K_M", "IQ4_XS")
POINTS = [*(f"mix-{name}" for name in MIXED), *(f"pure-{name}" for name in PURE),
          *(f"file-{name}" for name in FILES),
          *(f"mix-{name}-Q8_0" for name in AS_AT_OTHER_WIDTHS)]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", nargs="?", type=Path)
    parser.add_argument("ids", nargs="?", type=Path)
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--point", choices=POINTS)
    parser.add_argument("--list", action="store_true")
    arguments = parser.parse_args()
    if arguments.list:
        print(json.dumps(POINTS))
        return
    if not (arguments.out and arguments.point):
        parser.error("SOURCE_DIR, IDS, OUT_DIR and --point are needed")
    work = Path(os.environ.get("PEER_WORK") or Path.home() / ".cache" / "pliant-bench-llama-cpp")
    tools = Tools.built(work)
    model = Model.converted(tools, arguments.source, arguments.ids, work)
    started = time.time()
    kind, _, name = arguments.point.partition("-")
    if kind == "file":
        types, data, note = written_file(tools, model, name)
    else:
        types, note = chosen_types(tools, model, kind, name)
        weights = {name: model.tensor(name) for name in types}
        data = tools.quantized(weights, types, model.importance)
    finish(arguments, tools, model, types, data, note, time.time() - started)


def finish(
    arguments: Any,
    tools: Tools,
    model: Model,
    types: dict[str, str],
    data: dict[str, Any],
    note: str,
    seconds: float,
) -> None:
    from safetensors.torch import save_file

    weights, sizes = {}, {"linear_bytes": 0, "outer_bytes": 0, "other_bytes": 0}
    for name, raw in data.items():
        weights |= model.named(name, tools.dequantized(raw, types[name], model.shapes[name]))
        outer = name in ("token_embd.weight", "output.weight")
        sizes["outer_bytes" if outer else "linear_bytes"] += raw.nbytes
    sizes["other_bytes"] = sum(4 * math.prod(model.shapes[n]) for n in model.shapes - data.keys())
    save_file(weights, arguments.out / "weights.safetensors")
    count = {t: list(types.values()).count(t) for t in sorted(set(types.values()))}
    about = {"peer": "llama_cpp", "version": f"{PACKAGE}, {tools.version}",
             "point": arguments.point, "options": {"tensors": count, "imatrix": True}, **sizes,
             "seconds": seconds, "device": "cpu", "note": note}  # fmt: skip
    (arguments.out / "point.json").write_text(json.dumps(about, indent=1))


class Model:
    """A checkpoint as llama.cpp's converter writes it, with its importance matrix.

    shapes: [out, in] of every tensor by GGUF name. quantizable: the matrices.
    """

    def __init__(self, gguf: Path, imatrix: Path, source: Path) -> None:
        import numpy as np
        from gguf import GGUFReader, get_tensor_name_map
        from gguf.constants import MODEL_ARCH_NAMES

        self.gguf, self.imatrix = gguf, imatrix
        self._reader = GGUFReader(gguf)
        self._tensors = {t.name: t for t in self._reader.tensors}
        self.shapes = {n: tuple(int(x) for x in t.shape[::-1]) for n, t in self._tensors.items()}
        self.quantizable = [n for n, shape in self.shapes.items() if len(shape) == 2]
        self._arch = self.field("general.architecture")
        known = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
        names = get_tensor_name_map(known[self._arch], self.field(f"{self._arch}.block_count"))
        self._source = checkpoint_tensors(source)
        self._hf = {names.get_name(n, try_suffixes=(".weight", ".bias")): n for n in self._source}
        self.importance: dict[str, Any] = {}
        sums = {t.name: t.data for t in GGUFReader(imatrix).tensors}
        for name in self.quantizable:
            if f"{name}.in_sum2" in sums:
                count = float(np.ravel(sums[f"{name}.counts"])[0])
                self.importance[name] = np.ravel(sums[f"{name}.in_sum2"]) / count
        for name in self.shapes:
            back = next(iter(self.named(name, self.tensor(name)).items()))
            if not bool((self._source[back[0]].float() == back[1]).all()):
                fail(f"{name} of the converted model is not {back[0]} of the checkpoint")

    @classmethod
    def converted(cls, tools: Tools, source: Path, ids: Path, work: Path) -> Model:
        """Convert and observe once for each checkpoint and calibration set."""
        digest = hashlib.sha256(ids.read_bytes())
        for file in sorted(source.glob("*.safetensors")):
            digest.update(f"{file.absolute()} {file.stat().st_size}".encode())
        place = work / digest.hexdigest()[:16]
        place.mkdir(parents=True, exist_ok=True)
        by_tool = os.environ.get("PEER_IMATRIX") == "tool"
        gguf, imatrix = place / "f32.gguf", place / f"imatrix{'-tool' if by_tool else ''}.gguf"
        if not gguf.exists():
            run([sys.executable, str(tools.convert), str(source), "--outtype", "f32",
                 "--outfile", str(gguf)])  # fmt: skip
        if not imatrix.exists():
            observe = collect_by_tool if by_tool else collect
            observe(tools, source, ids, gguf, imatrix)
        return cls(gguf, imatrix, source)

    def field(self, key: str) -> Any:
        return self._reader.fields[key].contents()

    def fields(self) -> list[Any]:
        return list(self._reader.fields.values())

    def tensor(self, name: str) -> Any:
        return self._tensors[name].data

    def named(self, name: str, value: Any) -> dict[str, Any]:
        """A tensor of llama.cpp under its Hugging Face name and in its row order."""
        import torch

        tensor = torch.from_numpy(value.copy())
        if self._arch == "llama" and re.search(r"attn_[qk]\.weight", name):
            # llama.cpp pairs neighbouring rows for rotary positions, transformers halves of a head.
            kind = "head_count" if "attn_q" in name else "head_count_kv"
            heads = self.field(f"{self._arch}.attention.{kind}")
            rows, width = tensor.shape
            pairs = tensor.reshape(heads, rows // heads // 2, 2, width)
            tensor = pairs.transpose(1, 2).reshape(rows, width).contiguous()
        return {self._hf[name]: tensor}


def chosen_types(tools: Tools, model: Model, kind: str, name: str) -> tuple[dict[str, str], str]:
    """The type of every matrix of a pure or mix point."""
    file, _, embedding = name.partition("-")
    types = asked_types(tools, model, PURE[file] if kind == "pure" else file)
    outer = {n: t for n, t in types.items() if not n.startswith("blk.")}
    if kind == "pure":
        types = dict.fromkeys(types, file) | outer
    if embedding:
        types |= dict.fromkeys(outer, embedding)
    shown = ", ".join(sorted({types[n] for n in outer}))
    return types, f"rows joined to whole blocks, which llama-quantize refuses; embedding {shown}"


def asked_types(tools: Tools, model: Model, file: str) -> dict[str, str]:
    """What llama-quantize chooses for each matrix when every width is a multiple of 256."""
    import numpy as np
    from gguf import GGUFValueType, GGUFWriter

    wide = model.gguf.with_name("wide.gguf")
    writer = GGUFWriter(wide, model.field("general.architecture"))
    for field in model.fields():
        if field.name.startswith(("GGUF.", "tokenizer.", "general.architecture")):
            continue
        element = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=element)
    for name, shape in model.shapes.items():
        columns = -(-shape[-1] // 256) * 256
        writer.add_tensor(name, np.zeros((2, columns) if len(shape) == 2 else columns, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    said = run([str(tools.bin / "llama-quantize"), "--dry-run", "--imatrix", str(model.imatrix),
                str(wide), file])  # fmt: skip
    found = dict(re.findall(r"\] +(\S+) +- \[.*?\], type = .*\((\w+)\)", said))
    types = {name: found[name].upper() for name in model.quantizable if name in found}
    if len(types) != len(model.quantizable):
        fail(f"llama-quantize named types for {len(types)} of {len(model.quantizable)} matrices")
    return types


def written_file(
    tools: Tools, model: Model, file: str
) -> tuple[dict[str, str], dict[str, Any], str]:
    """Types and bytes of the file that llama-quantize writes, and what it fell back on."""
    from gguf import GGUFReader

    out = model.gguf.with_name(f"{file}.gguf")
    said = run([str(tools.bin / "llama-quantize"), "--imatrix", str(model.imatrix),
                str(model.gguf), str(out), file, str(THREADS)])  # fmt: skip
    tensors = [t for t in GGUFReader(out).tensors if t.name in model.quantizable]
    fallen = re.search(r"(\d+) of (\d+) tensor\(s\) required fallback", said)
    data = {t.name: t.data.reshape(-1).copy() for t in tensors}
    types = {t.name: t.tensor_type.name for t in tensors}
    out.unlink()
    told = f"{fallen[1]} of {fallen[2]} tensors fell back to larger types" if fallen else ""
    return types, data, told or "no tensor fell back"


def checkpoint_tensors(source: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for file in sorted(source.glob("*.safetensors")):
        found |= load_file(file)
    return found


if __name__ == "__main__":
    main()
