"""torchao: weight-only integers. Needs no calibration data.

Options, from its quantization documentation. At 4 bits Int4WeightOnlyConfig's packings need CUDA,
XPU or NPU (plain: the package mslk); on a CPU the same scheme is PrototypeInt4WeightOnlyConfig,
two integers a byte with a bfloat16 scale and zero point a group. The tile points are
Int4WeightOnlyConfig's tile_packed_to_4d, whose HQQ choice of scales it recommends; they need CUDA,
and their rows are padded to a multiple of 1024. IntxWeightOnlyConfig takes 1 to 8
bits; of its two ways to choose scales, HQQ_SCALE_ONLY has the smaller error on normal numbers below
4 bits (0.192 against 0.196 at 3, 0.379 against 0.459 at 2), asymmetric AFFINE at 4. It stores one
integer a byte at any width ("unpacked"), and that is what the bytes count; the note says what
packed integers would take.
"""

from __future__ import annotations

import torch
from _common import GROUP, CannotMake, Job, Result, linears, main, per_kind

POINTS = {
    "int4-g32": {"bits": 4, "group_size": 32, "config": "int4"},
    "int4-g64": {"bits": 4, "group_size": GROUP, "config": "int4"},
    "int4-g64-hqq": {"bits": 4, "group_size": GROUP, "config": "int4", "algorithm": "hqq"},
    "tile4-g64-hqq": {"bits": 4, "group_size": GROUP, "config": "tile", "algorithm": "hqq"},
    "tile4-g32-hqq": {"bits": 4, "group_size": 32, "config": "tile", "algorithm": "hqq"},
    "intx4-g64": {"bits": 4, "group_size": GROUP, "config": "intx", "algorithm": "affine"},
    "intx3-g64": {"bits": 3, "group_size": GROUP, "config": "intx", "algorithm": "hqq_scale_only"},
    "intx2-g64": {"bits": 2, "group_size": GROUP, "config": "intx", "algorithm": "hqq_scale_only"},
    "intx2-g32": {"bits": 2, "group_size": 32, "config": "intx", "algorithm": "hqq_scale_only"},
}


def make(job: Job) -> Result:
    from torchao.quantization import quantize_

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if job.options["config"] == "tile" and device == "cpu":
        raise CannotMake("tile_packed_to_4d needs CUDA")
    if job.options["config"] == "int4":
        device = "cpu"  # the prototype's
    weights, kinds, packed = {}, {}, 0
    for name, weight in linears(job.source):
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight.data = weight.to(device, torch.bfloat16)
        quantize_(layer, config(**job.options))
        coded = layer.weight
        for kind in coded.tensor_data_names:
            tensor = getattr(coded, kind)
            kinds[kind] = kinds.get(kind, 0) + tensor.nbytes
            whole = kind == "qdata"
            packed += weight.numel() * job.options["bits"] // 8 if whole else tensor.nbytes
        if job.options["config"] == "intx":
            weights[name] = coded.dequantize()
        else:  # this tensor offers only its product: take it of the identity
            with torch.no_grad():
                identity = torch.eye(weight.shape[1], dtype=torch.bfloat16, device=device)
                weights[name] = layer(identity).T
    note = f"{per_kind(kinds)}; with packed integers {packed}"
    return Result(weights, sum(kinds.values()), note=note)


def config(bits: int, group_size: int, config: str, algorithm: str | None = None) -> object:
    """torchao's configuration object of a point."""
    if config == "int4":
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        chosen = {} if algorithm is None else {"int4_choose_qparams_algorithm": algorithm}
        return PrototypeInt4WeightOnlyConfig(
            group_size=group_size, set_inductor_config=False, **chosen
        )
    if config == "tile":
        from torchao.quantization import Int4WeightOnlyConfig

        return Int4WeightOnlyConfig(
            group_size=group_size,
            int4_packing_format="tile_packed_to_4d",
            int4_choose_qparams_algorithm=algorithm,
            set_inductor_config=False,
        )
    from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerGroup

    return IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"),
        granularity=PerGroup(group_size),
        mapping_type=MappingType.ASYMMETRIC,
        intx_choose_qparams_algorithm=algorithm,
    )


if __name__ == "__main__":
    main("torchao", POINTS, make)
