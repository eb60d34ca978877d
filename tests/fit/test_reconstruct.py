"""Reconstruction over windows: what feeds them, and a smaller damage on text that was not used."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from pliant.codes import Code
from pliant.errors import RecipeError
from pliant.fit import reconstruct as module
from pliant.fit.evaluate import Evaluator
from pliant.fit.recipe import RungSpec
from pliant.fit.reconstruct import reconstruct
from pliant.methods import find
from pliant.methods.window import Window, decoded
from pliant.model import StreamedModel, open_checkpoint
from pliant.observe import Statistics
from tests.model.tiny import configurations, save

IDS = torch.randint(3, 128, (128, 12), generator=torch.Generator().manual_seed(1))


def rounded(model: StreamedModel, bits: int = 3, outer: bool = False) -> dict[str, Code]:
    return {
        t.name: find("rtn").function(model.weight(t), Statistics(), bits=bits, group_size=32)
        for t in model.targets
        if outer or t.block is not None
    }


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> StreamedModel:
    """Two layers whose norms weigh some channels far more than others, as trained ones do."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, initializer_range=0.1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.mul_(torch.exp(torch.randn_like(parameter)))
    directory = tmp_path_factory.mktemp("uneven")
    model.save_pretrained(directory)
    return StreamedModel(open_checkpoint(directory), resident=True)


def test_held_out_damage_falls_from_the_start_to_windows_of_one_to_windows_of_two(
    uneven: StreamedModel,
) -> None:
    codes = rounded(uneven)
    evaluator = Evaluator(uneven, IDS[96:])
    options = {"rate": 3e-2, "scale_rate": 5e-3, "steps": 80, "batch": 8, "truncate": False}
    damages = [evaluator.damage(lambda t: codes.get(t.name))]
    seen: list[tuple[int, int]] = []
    for window in (1, 2):
        seen.clear()
        made = reconstruct(
            uneven, IDS[:96], codes, "cbq", options, window=window,
            progress=lambda done, of: seen.append((done, of)),
        )  # fmt: skip
        assert {n: c.nbytes for n, c in made.items()} == {n: c.nbytes for n, c in codes.items()}
        damages.append(evaluator.damage(lambda t, made=made: made.get(t.name)))  # type: ignore[misc]
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert damages[1] < 0.9 * damages[0]
    assert damages[2] <= damages[1]


def spied(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Window, dict[str, Code], Tensor]]:
    """Windows as a method that changes nothing sees them, each with what it would give."""
    windows: list[tuple[Window, dict[str, Code], Tensor]] = []

    def look(window: Window, codes: dict[str, Code]) -> dict[str, Code]:
        given = decoded(codes, window.device)
        windows.append((window, codes, torch.cat([y for _, y in window.through(given, 4)])))
        return codes

    info = replace(find("cbq"), function=look)
    monkeypatch.setattr(module, "find", lambda name: info)
    return windows


@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "mixtral"])
def test_windows_are_fed_by_the_compressed_layers_before_them(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(configurations()[family], tmp_path / "model")
    model = StreamedModel(open_checkpoint(tmp_path / "model"))
    codes = rounded(model, bits=4, outer=True)
    windows = spied(monkeypatch)
    made = reconstruct(model, IDS[:6], codes, window=2)
    assert made == codes
    streams: list[list[Tensor]] = []
    for lookup in (lambda t: None, lambda t: codes[t.name].decode()):
        stream: list[Tensor] = []
        with model.substitute(lookup):
            last = model.capture(IDS[:6], lambda i, hidden, s=stream: s.append(hidden.clone()))  # type: ignore[misc]
        streams.append([*stream, last])
    original, compressed = streams
    narrow = [(i, i + 1) for i in range(3)]
    for (window, own, found), (start, stop) in zip(windows, [*narrow, (0, 2), (1, 3)], strict=True):
        assert {t.name for t in model.targets if t.block in range(start, stop)} == set(own)
        torch.testing.assert_close(window.inputs, compressed[start], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(window.outputs, original[stop], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found, compressed[stop], rtol=1e-4, atol=1e-4)


def test_gradients_reach_every_weight_of_a_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(configurations()["mixtral"], tmp_path / "model")
    model = StreamedModel(open_checkpoint(tmp_path / "model"))
    reached: dict[str, float] = {}

    def look(window: Window, codes: dict[str, Code]) -> dict[str, Code]:
        weights = {n: w.requires_grad_(True) for n, w in decoded(codes, window.device).items()}
        window.run(weights, window.inputs).square().sum().backward()  # type: ignore[no-untyped-call]
        for name, weight in weights.items():
            reached[name] = 0.0 if weight.grad is None else float(weight.grad.abs().sum())
        return codes

    monkeypatch.setattr(module, "find", lambda name: replace(find("cbq"), function=look))
    codes = rounded(model)
    reconstruct(model, IDS[:8], codes, window=1)
    assert reached.keys() == codes.keys()
    assert min(reached.values()) > 0


def test_mistakes_are_told(uneven: StreamedModel) -> None:
    with pytest.raises(RecipeError, match="quantize"):
        reconstruct(uneven, IDS[:2], {}, "rtn")
    with pytest.raises(RecipeError, match="stepz"):
        reconstruct(uneven, IDS[:2], {}, "cbq", {"stepz": 1})
    with pytest.raises(RecipeError, match="at least 1"):
        reconstruct(uneven, IDS[:2], {}, window=0)


def test_a_rung_cannot_be_a_reconstruction() -> None:
    with pytest.raises(RecipeError, match="improves codes"):
        RungSpec(method="cbq").check()
