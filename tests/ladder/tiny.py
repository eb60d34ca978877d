"""A tiny Llama as an artifact with three rungs a target."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from pliant.codes import Dense, GroupInt
from pliant.ladder import Ladder, Proposal, Step, Writer
from pliant.model import find_targets
from pliant.plan.memory import activation_bytes, kv_cache_bytes

torch.set_num_threads(1)


def tiny_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=260, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True,
        eos_token_id=2, bos_token_id=1, pad_token_id=0, max_position_embeddings=512,
    )  # fmt: skip


# Between the smallest weights and the largest, whatever the plan reserves beside them.
FITTED_MEMORY = (
    kv_cache_bytes(tiny_config(), 64, 1) + activation_bytes(tiny_config(), 64, 1) + 165_000
)


def group_int(weight: torch.Tensor, bits: int) -> GroupInt:
    grouped = weight.view(weight.shape[0], -1, 32)
    scales = grouped.abs().amax(-1) / (2 ** (bits - 1) - 0.5)
    scales = scales.clamp(min=1e-6).half()
    level = (grouped / scales[..., None].float() + 2 ** (bits - 1)).round()
    q = level.clamp(0, 2**bits - 1).to(torch.uint8).view(weight.shape)
    return GroupInt.pack(q, scales, None, bits, 32)


def proposals(target, weight: torch.Tensor) -> list[Proposal]:
    made = [
        Proposal(target.name, "rtn", {"bits": bits}, group_int(weight, bits), 1 / 4**bits)
        for bits in (2, 4)
    ]
    return [*made, Proposal(target.name, "dense", {}, Dense(weight.half()), 0.0)]


def write_artifact(out: Path, writer: Writer | None = None, **options) -> Path:
    """Fit the tiny model the way `fit` would: shard by shard, then the climb."""
    torch.manual_seed(0)
    config = tiny_config()
    model = AutoModelForCausalLM.from_config(config).eval()
    targets = find_targets(model)
    writer = writer or Writer(out, key="tiny", **options)
    for block in (0, 1, None):
        shard = "outer" if block is None else f"block-{block:05d}"
        if writer.has(shard):
            continue
        inside = [t for t in targets if t.block == block]
        writer.write(
            shard,
            [p for t in inside for p in proposals(t, t.slice(model.get_parameter(t.parameter)))],
        )
    taken = {t.parameter for t in targets}
    writer.write_fixed({n: p.data for n, p in model.named_parameters() if n not in taken})
    rungs = writer.all_rungs()
    names = sorted(rungs)
    climb = tuple(
        Step(name, index, 1.0 / (i + 1))
        for i, (index, name) in enumerate((i, n) for i in (1, 2) for n in names)
    )
    return writer.finish(
        Ladder({n: tuple(r) for n, r in rungs.items()}, climb, writer.fixed_bytes, 2.0),
        files={"config.json": config.to_json_string(), "recipe.yaml": "seed: 0\n"},
        targets=[dataclasses.asdict(t) for t in targets],
        budget={"memory": FITTED_MEMORY, "context": 64, "batch": 1},
        recipe={"seed": 0},
        provenance={"source": "tiny"},
    )
