"""Peak memory of `pliant fit` on a randomly initialised Llama shape of about a billion parameters.

    python bench/fit_memory.py --text wikitext2-test.txt [--layers 16] [--work DIR]

Writes the checkpoint layer by layer (bf16, SmolLM2's tokenizer), fits it in a child process on a
few calibration sequences with two rungs a target, and compares the child's peak resident memory
(VmHWM, shared libraries and all) with 40% of the checkpoint plus 1.5 GiB. Exits with 1 above it.
The codes of a layer are held until it is written: the default seven rungs hold 4 bytes a weight
of one layer, two rungs 1.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from pliant.budget import format_size
from pliant.measure.memory import run_child
from pliant.model import open_checkpoint

RESULTS = Path(__file__).parent / "results"
RECIPE = """
calibration: {sequences: 4, length: 512}
search: {measurements: 2, sequences: 1}
rules:
  - rungs: [{method: gptq, bits: 3, scale_bits: 6}, {method: gptq, bits: 4, scale_bits: 6}]
"""


def write_checkpoint(out: Path, layers: int) -> int:
    """Random weights of a Llama shape; returns the bytes of its tensors."""
    tokenizer = open_checkpoint("smollm2").directory
    hidden, inner, heads, kv_heads, size = 2048, 8192, 32, 8, 64
    config = LlamaConfig(
        vocab_size=49152, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=size,
        max_position_embeddings=8192, tie_word_embeddings=True, dtype="bfloat16",
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(out)
    for file in tokenizer.glob("tokenizer*"):
        shutil.copy(file, out)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.02).bfloat16()

    shapes = {
        "self_attn.q_proj": (heads * size, hidden), "self_attn.k_proj": (kv_heads * size, hidden),
        "self_attn.v_proj": (kv_heads * size, hidden), "self_attn.o_proj": (hidden, heads * size),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    files: dict[str, str] = {}
    total = 0

    def write(name: str, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal total
        save_file(tensors, out / name)
        files.update(dict.fromkeys(tensors, name))
        total += sum(t.nbytes for t in tensors.values())

    write("model-00000.safetensors", {
        "model.embed_tokens.weight": normal(49152, hidden),
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
    })  # fmt: skip
    for layer in range(layers):
        stem = f"model.layers.{layer}."
        tensors = {f"{stem}{name}.weight": normal(*shape) for name, shape in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{stem}{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        write(f"model-{layer + 1:05d}.safetensors", tensors)
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", required=True)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--work", default=None)
    arguments = parser.parse_args()
    work = Path(arguments.work or tempfile.mkdtemp(prefix="pliant-bench-"))
    source = work / "llama-1b"
    source.mkdir(parents=True, exist_ok=True)
    size = write_checkpoint(source, arguments.layers)
    recipe = work / "recipe.yaml"
    recipe.write_text(RECIPE)
    memory = size // 4 + (300 << 20)
    started = time.time()
    done = run_child(
        [sys.executable, "-m", "pliant", "fit", str(source), "--memory", str(memory), "--text",
         arguments.text, "--recipe", str(recipe), "-o", str(work / "out"), "--overwrite", "--json"]
    )  # fmt: skip
    if done.returncode:
        print(done.stderr)
        sys.exit(done.returncode)
    bound = int(0.4 * size + 1.5 * 2**30)
    result = {
        "checkpoint_bytes": size, "peak_bytes": done.peak, "bound_bytes": bound,
        "seconds": round(time.time() - started), "fit": json.loads(done.stdout),
    }  # fmt: skip
    print(
        f"checkpoint {format_size(size)}, peak {format_size(done.peak)}, "
        f"bound {format_size(bound)}, {result['seconds']} s"
    )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "fit_memory.json").write_text(json.dumps(result, indent=1))
    sys.exit(0 if done.peak <= bound else 1)


if __name__ == "__main__":
    main()
