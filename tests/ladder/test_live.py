"""An open model at a size is the same model whichever way it got there."""

from __future__ import annotations

import gc

import pytest
import torch
from transformers import PreTrainedModel

from pliant.budget import format_size
from pliant.errors import BudgetError, CorruptError
from pliant.ladder import Artifact, load
from pliant.model import code_of

from .tiny import FITTED_MEMORY

IDS = torch.arange(3, 23)[None]


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def held_bytes(model) -> int:
    codes = {name: code_of(model, name) for name in model.plan.allocation}
    return sum(code.nbytes for code in codes.values())


def sizes(directory, count=5):
    ladder = Artifact.open(directory).ladder
    low, high = ladder.smallest_bytes, ladder.largest_bytes
    return [low + (high - low) * i // (count - 1) for i in range(count)]


def test_it_is_a_transformers_model_that_holds_what_was_planned(tiny):
    for size in sizes(tiny):
        model = load(tiny, weights=size)
        assert isinstance(model, PreTrainedModel)
        assert type(model).__name__ == "LlamaForCausalLM"
        assert model.plan.weight_bytes <= size
        fixed = model.artifact.document.fixed.nbytes
        assert held_bytes(model) + fixed == model.plan.weight_bytes
        parts = model.plan.breakdown
        assert parts.weights + parts.embeddings == model.plan.weight_bytes
        assert parts.embeddings > 0
        assert logits(model).isfinite().all()


def test_resizing_gives_the_model_that_opening_gives(tiny):
    fresh = {size: logits(load(tiny, weights=size)) for size in sizes(tiny)}
    model = load(tiny, weights=sizes(tiny)[0])
    order = [*sizes(tiny), *reversed(sizes(tiny)), sizes(tiny)[3], sizes(tiny)[1]]
    for size in order:
        plan = model.resize(weights=size)
        assert plan is model.plan
        assert torch.equal(logits(model), fresh[size])


def test_resizing_reads_only_what_changes(tiny, monkeypatch):
    model = load(tiny, weights=sizes(tiny)[1])
    before = {name: code_of(model, name) for name in model.plan.allocation}
    old = dict(model.plan.allocation)
    read = []
    real = Artifact.load_code
    monkeypatch.setattr(Artifact, "load_code", lambda s, t, i: read.append(t) or real(s, t, i))
    model.resize(weights=sizes(tiny)[2])
    changed = [t for t, i in model.plan.allocation.items() if old[t] != i]
    assert sorted(read) == sorted(changed)
    for name, code in before.items():
        assert (code_of(model, name) is code) == (name not in changed)


def test_a_total_becomes_weights_cache_and_activations(tiny):
    model = load(tiny)
    plan = model.plan
    assert plan.memory == FITTED_MEMORY == plan.planned_bytes + plan.breakdown.free
    assert (plan.context, plan.batch) == (64, 1)
    assert load(tiny, memory=FITTED_MEMORY).plan == plan
    assert plan.weight_bytes < model.artifact.ladder.largest_bytes
    longer = load(tiny, memory=FITTED_MEMORY, context=80)
    assert longer.plan.breakdown.kv_cache > plan.breakdown.kv_cache
    assert longer.plan.weight_bytes < plan.weight_bytes
    largest = load(tiny, memory="1GiB").plan
    assert largest.weight_bytes == Artifact.open(tiny).ladder.largest_bytes
    assert largest.breakdown.free > 0
    assert model.resize(memory="1GiB") == largest


def test_budgets_that_are_none(tiny):
    smallest = Artifact.open(tiny).ladder.smallest_bytes
    with pytest.raises(BudgetError, match=f"smallest size, {format_size(smallest)}"):
        load(tiny, weights=smallest - 1)
    with pytest.raises(BudgetError, match="smallest total is") as caught:
        load(tiny, memory=2000)
    least = int(str(caught.value).split(" bytes)")[0].split("(")[-1])
    assert load(tiny, memory=least).plan.weight_bytes == smallest
    with pytest.raises(BudgetError):
        load(tiny, memory=least - 1)
    with pytest.raises(BudgetError, match="not both"):
        load(tiny, memory=FITTED_MEMORY, weights=100_000)
    with pytest.raises(BudgetError, match="513 is more than the 512"):
        load(tiny, context=513)
    with pytest.raises(BudgetError, match="at least 1"):
        load(tiny, batch=0)
    model = load(tiny, weights=smallest)
    with pytest.raises(BudgetError, match="resize needs"):
        model.resize()
    with pytest.raises(BudgetError, match="smallest"):
        model.resize(weights=smallest - 1)
    assert model.plan.weight_bytes == smallest


def flip(path, position):
    raw = bytearray(path.read_bytes())
    raw[position] ^= 4
    path.write_bytes(raw)


def test_a_damaged_rung_is_found_before_anything_changes(mine):
    model = load(mine, weights=sizes(mine)[0])
    before, plan = logits(model), model.plan
    victim = model.artifact.rung("model.layers.1.self_attn.q_proj.weight", 2)
    flip(mine / victim.where.shard, victim.where.start + 1)
    with pytest.raises(CorruptError, match="damaged"):
        model.resize(weights=sizes(mine)[-1])
    assert model.plan is plan
    assert torch.equal(logits(model), before)
    model.resize(weights=sizes(mine)[1])


@pytest.mark.parametrize("way", [(0, -1), (-1, 0), (1, 3)])
@pytest.mark.parametrize("after", [1, 4, 6])
def test_a_failure_in_the_middle_of_a_resize_is_undone(tiny, monkeypatch, way, after):
    start, end = (sizes(tiny)[i] for i in way)
    model = load(tiny, weights=start)
    before, plan = logits(model), model.plan
    real, calls = Artifact.load_code, []

    def fail_once(self, target, index, **place):
        calls.append(target)
        if len(calls) == after:
            raise CorruptError("the disk went away")
        return real(self, target, index, **place)

    monkeypatch.setattr(Artifact, "load_code", fail_once)
    with pytest.raises(CorruptError, match="went away"):
        model.resize(weights=end)
    assert model.plan is plan
    assert torch.equal(logits(model), before)
    model.resize(weights=end)
    assert torch.equal(logits(model), logits(load(tiny, weights=end)))


@pytest.mark.parametrize("way", [(0, -1), (-1, 0), (1, 3), (3, 2)])
def test_weights_never_pass_the_larger_size_on_the_way(tiny, monkeypatch, way):
    start, end = (sizes(tiny)[i] for i in way)
    model = load(tiny, weights=start)
    ceiling = max(model.plan.weight_bytes, model.artifact.ladder.bytes_of(
        model.artifact.ladder.allocation(end)))  # fmt: skip
    fixed = model.artifact.document.fixed.nbytes
    names = list(model.plan.allocation)
    real, seen = Artifact.load_code, []

    def watched(self, target, index):
        code = real(self, target, index)
        held = sum(code_of(model, name).nbytes for name in names)
        seen.append(fixed + held + code.nbytes)
        return code

    monkeypatch.setattr(Artifact, "load_code", watched)
    model.resize(weights=end)
    assert max(seen) <= ceiling


def test_a_replaced_code_is_freed(tiny):
    import weakref

    model = load(tiny, weights=sizes(tiny)[-1])
    name = "model.layers.0.mlp.down_proj.weight"
    tensor = next(iter(code_of(model, name).tensors().values()))
    storage = weakref.ref(tensor)
    del tensor
    model.resize(weights=sizes(tiny)[0])
    gc.collect()
    assert storage() is None
