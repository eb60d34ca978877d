"""The importance matrix: the mean of squared inputs of each matrix over the calibration tokens."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from _ggml import THREADS, Tools, fail, run


def collect(tools: Tools, source: Path, ids: Path, gguf: Path, imatrix: Path) -> None:
    """Sums of squared inputs of every linear layer, in the file format of llama-imatrix."""
    import numpy as np
    import torch
    from gguf import GGUFReader, GGUFWriter, get_tensor_name_map
    from gguf.constants import MODEL_ARCH_NAMES
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    fields = GGUFReader(gguf).fields
    arch = fields["general.architecture"].contents()
    number = next(number for number, name in MODEL_ARCH_NAMES.items() if name == arch)
    names = get_tensor_name_map(number, fields[f"{arch}.block_count"].contents())
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    sums: dict[str, Any] = {}

    def watch(name: str) -> Any:
        def hook(_: Any, inputs: Any) -> None:
            found = inputs[0].reshape(-1, inputs[0].shape[-1]).double().square().sum(0)
            sums[name] = sums.get(name, 0) + found

        return hook

    for path, module in model.model.named_modules():
        name = names.get_name(f"model.{path}.weight", try_suffixes=(".weight",))
        if isinstance(module, torch.nn.Linear) and name:
            module.register_forward_pre_hook(watch(name))
    tokens = load_file(ids)["ids"]
    with torch.inference_mode():
        for row in tokens:
            model.model(input_ids=row[None], use_cache=False)
    partial = imatrix.with_suffix(".part.gguf")
    writer = GGUFWriter(partial, "")
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", ["calibration"])
    writer.add_uint32("imatrix.chunk_count", len(tokens))
    writer.add_uint32("imatrix.chunk_size", tokens.shape[1])
    for name, total in sums.items():
        writer.add_tensor(f"{name}.in_sum2", total.float().numpy()[None])
        writer.add_tensor(f"{name}.counts", np.full((1, 1), tokens.numel(), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(imatrix)


def collect_by_tool(tools: Tools, source: Path, ids: Path, gguf: Path, imatrix: Path) -> None:
    """llama-imatrix on the text of the calibration tokens."""
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    tokens = load_file(ids)["ids"]
    text = imatrix.with_suffix(".txt")
    tokenizer = AutoTokenizer.from_pretrained(source)
    text.write_text("".join(tokenizer.decode(row) for row in tokens), encoding="utf-8")
    partial = imatrix.with_suffix(".part.gguf")
    files = ["-m", str(gguf), "-f", str(text), "-o", str(partial)]
    size = ["-c", str(tokens.shape[1]), "--no-ppl", "-t", str(THREADS)]
    said = run([str(tools.bin / "llama-imatrix"), *files, *size])
    chunks = re.search(r"computing over (\d+) chunks", said)
    if not chunks or int(chunks[1]) != len(tokens):
        fail(f"llama-imatrix cut the text into {chunks and chunks[1]} chunks, not {len(tokens)}")
    partial.rename(imatrix)
