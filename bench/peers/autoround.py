"""AutoRound (SignRound).

Options, from its README: recipe "auto-round" (200 steps) at 4 bits, "auto-round-best" (1000 steps,
512 samples of 2048) with `enable_alg_ext` at 2 bits, "auto-round-light" (50 steps, rate 5e-3) if
time is short, "auto-round-opt-rtn" (0 steps) for the least. The samples are this bench's windows,
as many and as long as given, in place of the recipe's. Symmetric, its default; groups of 64 (its
own scheme W2A16G64), because 128 does not divide 576.

It is saved in its own format and the bytes are those of the saved tensors.
"""

from __future__ import annotations

import torch
from _common import GROUP, Job, Result, main, modules, per_kind, stored_bytes, unpack_gptq

RECIPES = {
    "rtn": {"iters": 0, "disable_opt_rtn": False},
    "light": {"iters": 50, "lr": 5e-3},
    "default": {"iters": 200},
    "best": {"iters": 1000},
}
POINTS = {
    f"{bits}b-g{group}-{recipe}": {
        "bits": bits,
        "group_size": group,
        "sym": True,
        **RECIPES[recipe],
        **({"enable_alg_ext": True} if bits == 2 and recipe != "rtn" else {}),
    }
    for recipe in ("rtn", "light", "default", "best")
    for bits, group in ((4, GROUP), (3, GROUP), (2, GROUP), (2, 32))
}


def make(job: Job) -> Result:
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids = job.calibration()
    model = AutoModelForCausalLM.from_pretrained(job.source, dtype=torch.bfloat16)
    rounding = AutoRound(
        model,
        AutoTokenizer.from_pretrained(job.source),
        dataset=[
            {"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids
        ],
        nsamples=len(ids),
        seqlen=ids.shape[1],
        batch_size=8,
        device_map=device,
        enable_torch_compile=False,
        **job.options,
    )
    saved = job.work / "saved"
    rounding.quantize_and_save(str(saved), format="auto_round")
    found = [saved, *saved.glob("*/")]
    saved = next(folder for folder in found if list(folder.glob("*.safetensors")))
    names = modules(job.source)
    kinds = stored_bytes(saved, names)
    weights = unpack_gptq(saved, names, job.options["bits"], offset=1)
    return Result(weights, sum(kinds.values()), note=f"{len(ids)} windows; {per_kind(kinds)}")


if __name__ == "__main__":
    main("auto-round", POINTS, make, peer="autoround")
