"""SmolLM2-135M as an artifact: it holds what was asked, reads what changes, and answers."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pliant.ladder import Artifact, Ladder, Proposal, Step, Writer
from pliant.measure import tensor_bytes
from pliant.model import StreamedModel, open_checkpoint
from pliant.run import Usage, load, stream

from ..ladder.tiny import group_int

pytestmark = pytest.mark.real
MIB = 2**20


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    torch.set_num_threads(2)
    checkpoint = open_checkpoint("smollm2")
    streamed = StreamedModel(checkpoint)
    writer = Writer(tmp_path_factory.mktemp("real") / "smollm2", key="round to nearest")
    for block in [*range(len(streamed.blocks)), None]:
        proposals = [
            Proposal(t.name, "rtn", {"bits": bits}, group_int(weight, bits), 4.0**-bits)
            for t in streamed.targets
            if t.block == block
            for weight in [streamed.weight(t)]
            for bits in (2, 8)
        ]
        writer.write("outer" if block is None else f"block-{block:05d}", proposals)
    writer.write_fixed({name: tensor.float() for name, tensor in streamed.others()})
    rungs = {target: tuple(found) for target, found in sorted(writer.all_rungs().items())}
    climb = tuple(Step(target, index, 3.0 - index) for index in (1,) for target in rungs)
    files = {p.name: p for p in checkpoint.directory.iterdir() if p.suffix in (".json", ".jinja")}
    yield writer.finish(
        Ladder(rungs, climb, writer.fixed_bytes, 4.0),
        files=files,
        targets=[dataclasses.asdict(target) for target in streamed.targets],
        budget={"memory": 160 * MIB, "context": 2048, "batch": 1},
    )
    torch.set_num_threads(1)


def test_twelve_sizes_hold_what_was_asked_and_read_only_what_changes(smollm2, monkeypatch):
    """Seconds are measured in bench/sizes.py; here, that a resize reads no more than it must."""
    ladder = Artifact.open(smollm2).ladder
    low, high = ladder.smallest_bytes, ladder.largest_bytes
    model = load(smollm2, weights=low)
    read = []
    real = Artifact.load_code
    monkeypatch.setattr(
        Artifact, "load_code", lambda self, t, i: read.append(t) or real(self, t, i)
    )
    for size in [low + (high - low) * i // 11 for i in range(12)]:
        before = model.plan.allocation
        read.clear()
        model.resize(weights=size)
        assert tensor_bytes(model) <= model.plan.weight_bytes <= size
        changed = {t for t, i in model.plan.allocation.items() if before[t] != i}
        assert set(read) == changed
        assert len(read) == len(changed)


def test_the_budget_is_used_and_the_answer_is_right(smollm2):
    model = load(smollm2)
    assert 0.97 * 160 * MIB <= model.plan.planned_bytes <= 160 * MIB
    assert model.resize(memory="1GiB").weight_bytes == model.artifact.ladder.largest_bytes
    tokenizer, usage = model.artifact.tokenizer(), Usage()
    answer = "".join(
        stream(model, tokenizer, "What is the capital of France?", max_new_tokens=8, usage=usage)
    )
    assert "Paris" in answer
    message = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(
        message, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**ids, max_new_tokens=usage.new_tokens, do_sample=False)
    new = out[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(new, skip_special_tokens=True) == answer
