"""HQQ (Half-Quadratic Quantization). Needs no calibration data.

Options, from the project's README ("What quantization settings should I use?"): nbits 4, group 64,
axis 1 to start with; axis 0 for better quality at the same memory, without the fast kernels. Both
axes are here, and at each width the smaller groups that cost bits and buy quality. `optimize=True`
(the half-quadratic solver) is BaseQuantizeConfig's own setting. Scales and zero points stay in 16
bits: the package has deprecated quantized ones. 3-bit integers are stored ten to 32 bits.
"""

from __future__ import annotations

import torch
from _common import Job, Result, linears, main, per_kind

POINTS = {
    f"{bits}b-g{group}-axis{axis}": {"nbits": bits, "group_size": group, "axis": axis}
    for bits, groups in ((4, (64, 32)), (3, (64, 32)), (2, (64, 32, 16)))
    for group in groups
    for axis in (1, 0)
}


def make(job: Job) -> Result:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights, kinds = {}, {"W_q": 0, "scale": 0, "zero": 0}
    for name, weight in linears(job.source):
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight.data = weight.float()
        config = BaseQuantizeConfig(**job.options)
        coded = HQQLinear(layer, config, compute_dtype=torch.float16, device=device)
        kinds["W_q"] += coded.W_q.nbytes
        kinds["scale"] += coded.meta["scale"].nbytes
        kinds["zero"] += coded.meta["zero"].nbytes
        weights[name] = coded.dequantize()
    return Result(weights, sum(kinds.values()), note=per_kind(kinds))


if __name__ == "__main__":
    main("hqq", POINTS, make)
