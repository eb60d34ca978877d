"""Steps in fixed places say what steps over a growing cache say, captured or not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pliant.model import StreamedModel, open_checkpoint
from pliant.observe import write_text
from pliant.observe.stepping import FixedSteps, _one_attention, stepper
from tests.model.tiny import configurations, save

torch.set_num_threads(1)


def tiny(directory: Path, device: str = "cpu", name: str = "llama") -> StreamedModel:
    save(configurations()[name], directory)
    return StreamedModel(open_checkpoint(directory), resident=True, device=device)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_fixed_places_change_nothing(tmp_path: Path, name: str) -> None:
    model = tiny(tmp_path, name=name)
    ids = write_text(model, 4, 11, seed=5)
    fixed, growing = FixedSteps(model, 4, 11), stepper(model, 4, 11)
    assert not isinstance(growing, FixedSteps)
    with torch.no_grad():
        for position in range(10):
            step = ids[:, position : position + 1]
            torch.testing.assert_close(fixed(step, position), growing(step, position))


def test_what_lies_ahead_is_not_seen(tmp_path: Path) -> None:
    """Room that a longer text left behind does not leak into the next one's first steps."""
    model = tiny(tmp_path)
    with torch.no_grad():
        one, other = FixedSteps(model, 2, 4), FixedSteps(model, 2, 64)
        ids = torch.tensor([[3], [4]])
        torch.testing.assert_close(one(ids, 0), other(ids, 0))


def test_a_sliding_window_is_left_to_the_model(tmp_path: Path) -> None:
    model = tiny(tmp_path)
    model.config.sliding_window = 8
    assert _one_attention(model, 8)
    assert not _one_attention(model, 9)
    model.config.sliding_window = None
    model.config.layer_types = ["full_attention", "linear_attention"]
    assert not _one_attention(model, 8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_step_says_the_same(tmp_path: Path) -> None:
    model = tiny(tmp_path, "cuda")
    ids = write_text(model, 4, 24, seed=5).to("cuda")
    captured, plain = FixedSteps(model, 4, 24), FixedSteps(model, 4, 24)
    assert captured.capture()
    with torch.no_grad():
        for position in range(23):
            step = ids[:, position : position + 1]
            torch.testing.assert_close(
                captured(step, position), plain(step, position), atol=1e-3, rtol=1e-3
            )
