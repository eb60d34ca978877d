"""bitsandbytes: NF4 and FP4. Needs no calibration data.

Options: NF4 rather than FP4 for weights of a
trained model, nested quantization of the block maxima (`compress_statistics`, "double quant") to
save 0.4 bits a weight at no cost in quality. Blocks of 64 are the default; 32 buy quality, 128
save bits. Blocks run over the flattened weight. Bytes are those of the tensors that Linear4bit
writes to a checkpoint (packed weights, maxima, their code, and the packed state).

The stored tensors are decoded here as its format says (high half of a byte first), not by
dequantize_4bit: its AVX512 kernel gives wrong weights where a row is no multiple of the block
(measured in 0.50.2: relative error 0.40 in place of 0.10 for blocks of 128 in rows of 576).
"""

from __future__ import annotations

from typing import Any

import torch
from _common import Job, Result, linears, main, per_kind

POINTS = {
    f"{kind}-b{block}{'-double' if double else ''}": {
        "quant_type": kind,
        "blocksize": block,
        "compress_statistics": double,
    }
    for kind, block, double in (
        ("nf4", 32, True),
        ("nf4", 64, True),
        ("nf4", 64, False),
        ("nf4", 128, True),
        ("fp4", 64, True),
    )
}


def make(job: Job) -> Result:
    from bitsandbytes.functional import quantize_4bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights, kinds = {}, {"weight": 0}
    for name, weight in linears(job.source):
        # 16 bits, as a model is loaded before its layers become Linear4bit.
        packed, state = quantize_4bit(weight.to(device, torch.float16), **job.options)
        kinds["weight"] += packed.nbytes
        for kind, tensor in state.as_dict(packed=True).items():
            kinds[kind] = kinds.get(kind, 0) + tensor.nbytes
        weights[name] = decoded(packed, state)
    return Result(weights, sum(kinds.values()), note=per_kind(kinds))


def decoded(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """The weight [out, in] that a packed weight and its quantization state stand for."""
    from bitsandbytes.functional import dequantize_blockwise

    largest = state.absmax
    if state.nested:
        largest = dequantize_blockwise(largest, state.state2) + state.offset
    halves = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], dim=1)
    values = state.code[halves.view(-1).long()].view(-1, state.blocksize)
    return (values * largest.float().view(-1, 1)).view(state.shape)


if __name__ == "__main__":
    main("bitsandbytes", POINTS, make)
