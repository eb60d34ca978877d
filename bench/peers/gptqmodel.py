"""GPTQModel: GPTQ.

Options, from its README and QuantizeConfig: its default is Group Aware Reordering ("gar",
activation order kept inside the groups, no cost at inference); `desc_act=True` is the full
activation order. Both are here. `damp_percent` is its default (0.05). EoRA is left out: it adds
16-bit factors, another size. Groups of 128 do not divide a width of 576; groups of 64 divide both
widths. Weights are loaded in bfloat16.

The layers are saved in GPTQ's own format and read back by the package, and the bytes are those of
the saved tensors: packed integers, scales, packed zero points (also stored when symmetric) and
g_idx, one int32 an input.
"""

from __future__ import annotations

import os
import time

import torch
from _common import GROUP, Job, Result, main, modules, per_kind, stored_bytes

GAR = {"desc_act": False, "act_group_aware": True}
ORDER = {"desc_act": True, "act_group_aware": False}
POINTS = {
    "4b-g64-gar": {"bits": 4, "group_size": GROUP, "sym": True, **GAR},
    "3b-g64-gar": {"bits": 3, "group_size": GROUP, "sym": True, **GAR},
    "2b-g64-gar": {"bits": 2, "group_size": GROUP, "sym": True, **GAR},
    "4b-g64-order": {"bits": 4, "group_size": GROUP, "sym": True, **ORDER},
    "3b-g64-order": {"bits": 3, "group_size": GROUP, "sym": True, **ORDER},
    "2b-g64-order": {"bits": 2, "group_size": GROUP, "sym": True, **ORDER},
    "4b-g64-order-asym": {"bits": 4, "group_size": GROUP, "sym": False, **ORDER},
    "3b-g64-order-asym": {"bits": 3, "group_size": GROUP, "sym": False, **ORDER},
    "2b-g64-order-asym": {"bits": 2, "group_size": GROUP, "sym": False, **ORDER},
    "2b-g32-order-asym": {"bits": 2, "group_size": 32, "sym": False, **ORDER},
}


def make(job: Job) -> Result:
    # Its default on a machine of two cores is one worker, and its model loader demands two.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = QuantizeConfig(**job.options, offload_to_disk=False, device=device)
    model = GPTQModel.load(str(job.source), config, dtype=torch.bfloat16)
    ids = job.calibration()
    windows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    # All are of one length: a batch changes nothing but the time.
    model.quantize(windows, batch_size=8 if device == "cuda" else 1)
    saved = job.work / "saved"
    model.save(str(saved))
    saved_at = time.time()
    del model
    names = modules(job.source)
    kinds = stored_bytes(saved, names)
    read = GPTQModel.load(str(saved), backend=BACKEND.GPTQ_TORCH, device="cpu")
    weights = {
        f"{name}.weight": read.model.get_submodule(name).dequantize_weight().T for name in names
    }
    note = f"{len(ids)} windows; {per_kind(kinds)}"
    return Result(weights, sum(kinds.values()), note=note, saved_at=saved_at)


if __name__ == "__main__":
    main("gptqmodel", POINTS, make)
