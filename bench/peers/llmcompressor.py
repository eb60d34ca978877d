"""llm-compressor: GPTQ and AWQ, weights only.

Options, from its documentation: GPTQ with `actorder="static"` (its default: "best accuracy recovery
with no runtime cost") and dampening 0.01; ranges by its "mse" observer, our choice over its
min-max. AWQ as a transform (`duo_scaling="both"`, the wider of its searches) followed by asymmetric
rounding, as its AWQ examples do (W4A16_ASYM), and by GPTQ. Groups of 64: 128 does not divide 576,
and its group size must.

The bytes are those of the tensors that compressed-tensors saves: packed integers, 16-bit scales,
packed zero points, and each layer's shape. AWQ folds its scales into the norms and the layers
before, so those are written as well, and its layers' distance from the source says nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from _common import GROUP, Job, Result, main, modules, per_kind, stored_bytes

POINTS: dict[str, dict[str, Any]] = {
    **{f"gptq-{b}b-g64": {"bits": b, "method": "gptq", "symmetric": True} for b in (4, 3, 2)},
    **{f"gptq-{b}b-g64-asym": {"bits": b, "method": "gptq", "symmetric": False} for b in (4, 3, 2)},
    **{f"awq-{b}b-g64-asym": {"bits": b, "method": "awq", "symmetric": False} for b in (4, 3, 2)},
    "awq-gptq-3b-g64-asym": {"bits": 3, "method": "awq+gptq", "symmetric": False},
}


def make(job: Job) -> Result:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    weights = QuantizationArgs(
        num_bits=job.options["bits"],
        type="int",
        symmetric=job.options["symmetric"],
        strategy="group",
        group_size=GROUP,
        observer="mse",
    )
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    recipe: list[Any] = []
    if not torch.cuda.is_available():
        # AWQ pins memory for copies to an accelerator, which fails where there is none.
        IntermediatesCache.pin_memory = lambda self, index, names=None: None
    if "awq" in job.options["method"]:
        recipe.append(AWQModifier(duo_scaling="both"))
    last = GPTQModifier if "gptq" in job.options["method"] else QuantizationModifier
    recipe.append(last(config_groups=groups, ignore=["lm_head"]))
    ids = job.calibration()
    rows = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    model = AutoModelForCausalLM.from_pretrained(job.source, dtype=torch.bfloat16)
    oneshot(
        model=model,
        dataset=Dataset.from_dict(rows),
        recipe=recipe,
        max_seq_length=ids.shape[1],
        num_calibration_samples=len(ids),
        batch_size=16 if torch.cuda.is_available() else 1,  # windows of one length: only faster
        pipeline="independent",  # a pass each: AWQ changes what GPTQ has to observe
    )
    saved = job.work / "saved"
    model.save_pretrained(saved, save_compressed=True)
    names = modules(job.source)
    kinds = stored_bytes(saved, names)
    plain = CompressedTensorsConfig(run_compressed=False)
    read = AutoModelForCausalLM.from_pretrained(saved, quantization_config=plain)
    return Result(changed(job, read), sum(kinds.values()), f"{len(ids)} windows; {per_kind(kinds)}")


def changed(job: Job, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights of the blocks' linear layers and norms in a model that was read back."""
    found = {}
    for name, tensor in model.state_dict().items():
        if ".layers." in name and name.endswith(("norm.weight", "_proj.weight")):
            found[name] = tensor
    return found


if __name__ == "__main__":
    main("llmcompressor", POINTS, make)
