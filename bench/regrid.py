"""Copy a Llama-like checkpoint so that its function stays and its quantization grid is gone.

SmolLM2 as it ships already lies on a 4-bit grid of blocks of 32, which a format that shares the
grid reproduces almost exactly. This script scales channels by seeded log-normal factors and takes
the factors back in the next linear, so that the model computes the same and no grid is left:

    norm -> q, k, v and norm -> gate, up     the norm's weight times f, the linears' columns over f
    v -> o                                   per key-value channel, repeated over its query heads
    up -> down                               per intermediate channel

The final norm feeds a tied head and is left alone, as is the embedding.

    python bench/regrid.py SOURCE OUT [--seed 0] [--sigma 0.15]
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

SIGMA = 0.15
TOLERANCE = 1e-3


def regrid(src_dir: str | Path, out_dir: str | Path, seed: int = 0, sigma: float = SIGMA) -> float:
    """Write the copy in float32; returns the largest difference of logits on random tokens."""
    source, out = Path(src_dir), Path(out_dir)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tokens = torch.randint(
        0, model.config.vocab_size, (4, 64), generator=torch.Generator().manual_seed(seed)
    )
    with torch.inference_mode():
        before = model(tokens).logits
        scale_channels(model, seed, sigma)
        save_copy(model, source, out)
        after = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(tokens).logits
    difference = float((before - after).abs().max())
    if not difference < TOLERANCE:
        raise SystemExit(f"the copy's logits differ by {difference:.2e}, above {TOLERANCE}")
    return difference


def scale_channels(model: torch.nn.Module, seed: int, sigma: float) -> None:
    """Fold the factors into `model` in place, computed in float64 and rounded once."""
    generator = torch.Generator().manual_seed(seed)

    def factors(n: int) -> Tensor:  # [n]
        return (torch.randn(n, generator=generator, dtype=torch.float64) * sigma).exp()

    def inputs(linears: list[torch.nn.Linear], f: Tensor) -> None:
        for linear in linears:
            linear.weight.copy_(linear.weight.double() / f)

    def outputs(linear: torch.nn.Linear, f: Tensor) -> None:
        linear.weight.copy_(linear.weight.double() * f[:, None])
        if linear.bias is not None:
            linear.bias.copy_(linear.bias.double() * f)

    config = model.config
    groups = config.num_attention_heads // config.num_key_value_heads
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]),
            (layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]),
        ):
            f = factors(norm.weight.numel())
            norm.weight.copy_(norm.weight.double() * f)
            inputs(readers, f)
        f = factors(attention.v_proj.out_features)
        outputs(attention.v_proj, f)
        per_head = f.view(config.num_key_value_heads, -1)
        inputs([attention.o_proj], per_head.repeat_interleave(groups, dim=0).reshape(-1))
        f = factors(mlp.up_proj.out_features)
        outputs(mlp.up_proj, f)
        inputs([mlp.down_proj], f)


def save_copy(model: torch.nn.Module, source: Path, out: Path) -> None:
    """Weights in float32 as one safetensors file, and every other file of the source as it is."""
    out.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.is_file() and not file.name.startswith("model") and file.suffix != ".gguf":
            shutil.copyfile(file, out / file.name)
    kept: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:  # a tied head is stored once
            kept[name] = tensor.contiguous()
            seen.add(tensor.data_ptr())
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})
    model.config.dtype = torch.float32
    model.config.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sigma", type=float, default=SIGMA)
    args = parser.parse_args()
    difference = regrid(args.source, args.out, args.seed, args.sigma)
    print(f"{args.out}: logits agree within {difference:.2e}")


if __name__ == "__main__":
    main()
