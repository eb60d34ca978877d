"""Any-Precision LLM: one model of nested codebooks, read at any width.

It is no package: set ANY_PRECISION_DIR to a checkout of SNU-ARC/any-precision-llm. Its quantizer
runs on a CPU; its engine's CUDA kernels are not needed here. Options, from its README: seed
precision 3, the default, upscaled bit by bit; squared gradients of the likelihood as weights of the
one-dimensional k-means, on this bench's windows in place of its 100 of 512 tokens of C4. The
two-bit points use seed 2, below the range of its paper. One group a row: its packer knows no other.

Bytes are those that a reader at that width needs: the bit planes up to it and its own 16-bit
tables (one of 2^bits values a row). The note gives the bytes of the file that holds all widths.
"""

from __future__ import annotations

import os
import sys

import torch
from _common import CannotMake, Job, Result, main

POINTS = {
    f"{bits}b-seed{seed}-of{parent}": {"bits": bits, "seed": seed, "parent": parent}
    for bits, seed, parent in ((2, 2, 4), (3, 2, 4), (4, 2, 4), (3, 3, 8), (4, 3, 8), (5, 3, 8))
}
REVISION = "a3257d02"  # the revision that these figures come from


def make(job: Job) -> Result:
    checkout = os.environ.get("ANY_PRECISION_DIR")
    if not checkout:
        raise CannotMake("set ANY_PRECISION_DIR to a checkout of SNU-ARC/any-precision-llm")
    sys.path.insert(0, checkout)
    from any_precision.analyzer import get_analyzer
    from any_precision.quantization import gradients as module
    from any_precision.quantization.quantize import seed_and_upscale

    ids = job.calibration()
    module.get_tokens = lambda *unused, **also_unused: list(ids)
    analyzer = get_analyzer(str(job.source), cpu_only=not torch.cuda.is_available())
    squared = module.get_gradients(analyzer)
    bits, seed, parent = job.options["bits"], job.options["seed"], job.options["parent"]
    seed_and_upscale(analyzer, squared, str(job.work), seed, parent, random_state=0)
    weights, size, whole = {}, 0, 0
    for index in range(analyzer.num_layers):
        labels = load(job, "weights", index)
        tables = {b: load(job, f"lut_{b}", index) for b in range(seed, parent + 1)}
        for name, label in labels.items():  # [out, 1, in] of the parent's codes
            table = torch.from_numpy(tables[bits][name])[:, 0].float()  # [out, 2^bits]
            codes = torch.from_numpy(label)[:, 0].long() >> (parent - bits)
            weights[f"model.layers.{index}.{name}.weight"] = table.gather(1, codes)
            size += codes.numel() * bits // 8 + tables[bits][name].nbytes
            whole += codes.numel() * parent // 8 + sum(t[name].nbytes for t in tables.values())
    note = (
        f"{len(ids)} windows; revision {REVISION}; the file of widths {seed} to {parent}: {whole}"
    )
    return Result(weights, size, note=note)


def load(job: Job, folder: str, index: int) -> dict:
    """One layer's arrays as the quantizer left them in its scratch folder."""
    return torch.load(job.work / folder / f"l{index}.pt", weights_only=False)


if __name__ == "__main__":
    main("any-precision-llm", POINTS, make, peer="anyprecision", version=REVISION)
