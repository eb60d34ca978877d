"""BitStack: residual blocks of signs and low-rank magnitudes, loaded in an order of importance.

It is no package: set BITSTACK_DIR to a folder that holds the folder bitstack of
xinghaow99/BitStack. It needs triton to be imported. Options, from its command line: weights scaled
by activations (its default), rank k 16, its default, for widths of 4096 and more; at 576 the
factors of rank 16 cost 0.74 bits a block, so there is rank 4 as well. `--score_importance` orders
blocks by the perplexity that each brings, on 32 windows; here 32 of this bench's windows in place
of WikiText-2's training text, and all windows for the scales. It loads all blocks of one level
before any of the next, so that levels no point reaches are left out (16 is its niter); nothing
that is loaded changes by that. Each measurement adds the blocks up once for all windows in place
of once a forward pass: the same sums.

The script scales in float32 and then turns to float16, in which it stores its factors. Scales are
folded into norms and other layers, so those are written as well. Written for a layer that returns
a tuple, it is given one around transformers' tensor. Bytes are those of the loaded blocks.
"""

from __future__ import annotations

import gc
import hashlib
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from _common import CannotMake, Job, Result, main

POINTS = {
    f"{bits}b-k{rank}": {"bits": bits, "k": rank, "windows": 32}
    for rank in (16, 4)
    for bits in (3, 2, 4)
}
MOST_BITS = max(options["bits"] for options in POINTS.values())
REVISION = "9f333d64"  # the revision that these figures come from


def make(job: Job) -> Result:
    checkout = os.environ.get("BITSTACK_DIR")
    if not checkout:
        raise CannotMake("set BITSTACK_DIR to the folder that holds BitStack's folder bitstack")
    sys.path.insert(0, checkout)
    from bitstack.utils.model_utils import generate_configs, sort_layers_and_bits_average

    made = prepared(job)
    started = time.perf_counter()
    sizes = made["bytes"]
    order = sort_layers_and_bits_average({"reduced_ppl": made["ppls"]})
    budget = job.options["bits"] * sum(w[0].numel() for w in made["sums"].values()) // 8
    configs = generate_configs(order, sizes, sum(sizes.values()))
    fitting = [config for config in configs if config["memory"] <= budget]
    if not fitting:
        raise CannotMake(f"one block a layer takes {configs[0]['memory']} bytes, above {budget}")
    chosen = fitting[-1]
    weights = {hf_name(n): made["sums"][n][b - 1] for n, b in chosen["layers"].items()}
    blocks = sum(chosen["layers"].values())
    note = f"{made['windows']} windows; {blocks} blocks in {len(sizes)} layers; revision {REVISION}"
    seconds = made["seconds"] + time.perf_counter() - started
    return Result(weights | made["norms"], chosen["memory"], note=note, seconds=seconds)


def prepared(job: Job) -> dict[str, Any]:
    """Blocks and their order, once for each checkpoint, calibration set and rank."""
    digest = hashlib.sha256(job.ids.read_bytes())
    digest.update(f"{job.source.absolute()} {job.options['k']} {job.options['windows']}".encode())
    place = Path(os.environ.get("PEER_WORK", job.work)) / f"{digest.hexdigest()[:16]}.pt"
    if not place.exists():
        made = decomposed(job)
        torch.save(made, place.with_suffix(".part"))
        place.with_suffix(".part").rename(place)
    found: dict[str, Any] = torch.load(place, weights_only=True)
    return found


def decomposed(job: Job) -> dict[str, Any]:
    from bitstack.modules.BitStackLinear import BitStackLinear, compose_weight
    from bitstack.utils import scale_utils
    from bitstack.utils.decompose import decompose
    from bitstack.utils.model_utils import calculate_memory_per_bit, eval_ppl
    from transformers import AutoModelForCausalLM

    started = time.perf_counter()
    ids, rank = job.calibration(), job.options["k"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        on_cpu(scale_utils)
    model = AutoModelForCausalLM.from_pretrained(job.source, dtype=torch.float32).eval()
    model.config.use_cache = False
    scale_utils.get_loaders = lambda **unused: list(ids.split(1))
    with layers_of_tuples(type(model.model.layers[0])), torch.no_grad():
        scale_utils.scale_model(model, None, "", 0, len(ids), ids.shape[1], 8, 1, rank, False, True)
    model = model.half()
    linears = [m for n, m in model.named_modules() if ".layers." in n and hasattr(m, "in_features")]
    numbers = sum(m.weight.numel() for m in linears)
    one = sum(m.weight.numel() // 8 + 2 * rank * sum(m.weight.shape) for m in linears)
    niter = -(-MOST_BITS * numbers // (8 * one)) + 1  # one level more than the largest point takes
    gc.freeze()  # it collects garbage after each layer, which takes longer than the layer
    decompose(model, niter, rank, False)
    model = model.to(device)
    coded = [m for m in model.modules() if isinstance(m, BitStackLinear)]
    sums: dict[str, list[torch.Tensor]] = {}
    with torch.no_grad():
        for layer in coded:
            total = torch.zeros(layer.out_features, layer.in_features, device=device).half()
            sums[layer.name] = []
            for i in range(niter):
                parts = [getattr(layer, f"{kind}_{i}") for kind in ("qweight", "u", "vt")]
                total = total + compose_weight(*parts, False, total.shape)
                sums[layer.name].append(total)
    BitStackLinear.forward = lambda self, x: torch.nn.functional.linear(
        x, sums[self.name][self.w_bit - 1], self.bias
    )
    few = ids[torch.linspace(0, len(ids) - 1, min(job.options["windows"], len(ids))).long()]
    ppls = []
    for bit in range(1, niter):  # as its main.py does
        for layer in coded:
            layer.set_bit(bit)
        found = []
        for layer in coded:
            layer.set_bit(bit + 1)
            value = eval_ppl(8, ids.shape[1], model, few, disable_tqdm=True)
            found.append({"layer": layer.name, "ppl": value})
            layer.set_bit(bit)
        ppls.append({"bit": bit, "ppls": found})
    norms = {n: p.cpu() for n, p in model.named_parameters() if ".layers." in n and p.dim() == 1}
    return {
        "sums": {name: [w.cpu() for w in levels] for name, levels in sums.items()},
        "bytes": calculate_memory_per_bit(model),
        "norms": {name: tensor.detach() for name, tensor in norms.items()},
        "ppls": ppls,
        "windows": len(ids),
        "seconds": time.perf_counter() - started,
    }


class layers_of_tuples:
    """transformers' decoder layers return a tensor; BitStack takes the first of a tuple.

    It also keeps the mask of all windows for a few of them: none means causal.
    """

    def __init__(self, kind: type) -> None:
        self.kind, self.forward = kind, kind.forward

    def __enter__(self) -> None:
        own = self.forward

        def forward(layer: Any, hidden_states: torch.Tensor, **named: Any) -> tuple[torch.Tensor]:
            return (own(layer, hidden_states, **named | {"attention_mask": None}),)

        self.kind.forward = forward

    def __exit__(self, *unused: object) -> None:
        self.kind.forward = self.forward


def on_cpu(scale_utils: Any) -> None:
    """It moves everything to an accelerator, which is not here."""
    torch.nn.Module.cuda = lambda self, *unused: self
    torch.Tensor.cuda = lambda self, *unused: self
    scale_utils.move_embed = scale_utils.move_position_embed = lambda *unused: None


def hf_name(name: str) -> str:
    """layer.0.self_attn.q_proj of BitStack."""
    return f"model.layers.{name.removeprefix('layer.')}.weight"


if __name__ == "__main__":
    main("bitstack", POINTS, make, version=REVISION)
