"""Opening on a device: read there, never whole in main memory, and resized there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pliant.errors import PliantError
from pliant.ladder import Artifact
from pliant.model import code_of
from pliant.run import load

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_a_device_that_is_not_there_is_one_clear_error(artifact: Path) -> None:
    for name in ("cuda:77", "nonsense"):
        with pytest.raises(PliantError, match="cannot be used"):
            load(artifact, device=name)


def test_codes_go_to_the_device_as_they_are_read(artifact: Path) -> None:
    opened = Artifact.open(artifact)
    place = torch.device("meta")
    codes = opened.load_codes(dict.fromkeys(opened.ladder.rungs, 0), place)
    assert {code.device for code in codes.values()} == {place}
    assert opened.load_code(next(iter(codes)), 0).device.type == "cpu"


@gpu
@pytest.mark.parametrize("device", ["cuda", "auto"])
def test_a_model_on_a_gpu_is_the_one_on_a_cpu(artifact: Path, device: str) -> None:
    there = load(artifact, weights=120_000, context=64, device=device)
    here = load(artifact, weights=120_000, context=64)
    assert there.dtype == torch.bfloat16
    ids = torch.arange(1, 9)[None]
    for size in (120_000, 60_000):
        for model in (here, there):
            model.resize(weights=size)
        for target in there.plan.allocation:
            code, other = code_of(there, target), code_of(here, target)
            assert code.device.type == "cuda"
            for name, tensor in other.tensors().items():
                assert torch.equal(code.tensors()[name].cpu(), tensor)
        with torch.inference_mode():
            logits, expected = there(ids.cuda()).logits.float().cpu(), here(ids).logits
        apart = torch.linalg.vector_norm(logits - expected)
        assert apart < 0.03 * torch.linalg.vector_norm(expected)


@gpu
def test_opening_takes_no_more_of_the_gpu_than_planned(artifact: Path) -> None:
    load(artifact, weights=60_000, context=64, device="cuda")  # libraries
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = load(artifact, weights=120_000, context=64, device="cuda")
    tensors = sum(len(code_of(model, t).tensors()) for t in model.plan.allocation)
    room = 512 * (tensors + len(list(model.buffers())) + len(list(model.parameters())))
    assert torch.cuda.max_memory_allocated() - before <= model.plan.weight_bytes + room
