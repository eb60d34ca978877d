"""Every family streams, names its targets and runs on codes exactly as transformers runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pliant.codes import Dense
from pliant.model import Checkpoint, StreamedModel, Target, coded_model, open_checkpoint, swap
from tests.model.tiny import configurations, save

CONFIGURATIONS = configurations()
IDS = torch.randint(3, 320, (3, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=sorted(CONFIGURATIONS))
def family(request: Any, tmp_path_factory: Any) -> tuple[Any, Checkpoint]:
    directory: Path = tmp_path_factory.mktemp(request.param)
    model = save(CONFIGURATIONS[request.param], directory)
    return model, open_checkpoint(directory)


def stored(model: Any, target: Target) -> Tensor:
    return target.slice(dict(model.named_parameters(remove_duplicate=False))[target.parameter])


def test_streamed_logits_equal_the_model(family: tuple[Any, Checkpoint]) -> None:
    model, checkpoint = family
    with torch.no_grad():
        expected = model(IDS).logits
    streamed = StreamedModel(checkpoint)
    torch.testing.assert_close(streamed.logits(IDS), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(streamed.logits(IDS, batch=2), expected, atol=1e-5, rtol=1e-5)


def test_weights_are_canonical(family: tuple[Any, Checkpoint]) -> None:
    model, checkpoint = family
    streamed = StreamedModel(checkpoint)
    assert len({target.name for target in streamed.targets}) == len(streamed.targets)
    for target in streamed.targets:
        weight = streamed.weight(target)
        assert tuple(weight.shape) == target.shape
        assert torch.equal(weight, stored(model, target))


def test_targets_cover_all_large_matrices(family: tuple[Any, Checkpoint]) -> None:
    model, checkpoint = family
    targets = StreamedModel(checkpoint).targets
    covered = {target.parameter for target in targets}
    positions = {"wpe", "embed_positions"}
    for name, parameter in model.named_parameters():
        large = parameter.dim() >= 2 and min(parameter.shape[-2:]) >= 64
        assert (name in covered) == (large and not positions & set(name.split("."))), name
    tied = model.config.tie_word_embeddings
    assert [t.kind for t in targets if t.block is None] == ["embedding"] + ["head"] * (not tied)


def test_linear_calls_see_each_multiply(family: tuple[Any, Checkpoint]) -> None:
    model, checkpoint = family
    streamed = StreamedModel(checkpoint)
    seen: dict[str, int] = {}

    def on_linear(target: Target, x: Tensor, y: Tensor) -> None:
        seen[target.name] = seen.get(target.name, 0) + x.shape[0]
        product = x @ stored(model, target).t()
        offset = y - product  # the bias, or nothing
        assert torch.allclose(offset, offset[:1].expand_as(offset), atol=1e-5)

    with torch.no_grad(), streamed.linear_calls(on_linear):
        streamed.logits(IDS)
    inner = {t.name for t in streamed.targets if t.kind != "embedding" or t.tied}
    assert seen.keys() <= inner
    assert all(name in seen for name in inner if "[" not in name)
    assert all(count == IDS.numel() for name, count in seen.items() if "[" not in name)


def test_gradients_equal_autograd(family: tuple[Any, Checkpoint]) -> None:
    """Backwards layer by layer through run_block and tail, and at every linear output."""
    model, checkpoint = family
    expected = _full_gradients(model)
    streamed = StreamedModel(checkpoint)
    inputs: list[Tensor] = []
    final = streamed.capture(IDS, lambda index, hidden: inputs.append(hidden.clone()))
    found: dict[str, Tensor] = {}

    def on_linear(target: Target, x: Tensor, y: Tensor) -> None:
        if y.requires_grad:
            x = x.detach()
            y.register_hook(lambda g: found.__setitem__(target.name, g.t() @ x))

    final.requires_grad_(True)
    with streamed.linear_calls(on_linear):
        streamed.tail(final).log_softmax(-1)[..., 5].sum().backward()
    gradient = final.grad
    for index in reversed(range(len(streamed.blocks))):
        hidden = inputs[index].requires_grad_(True)
        with streamed.block(index) as module, streamed.linear_calls(on_linear):
            streamed.run_block(module, index, hidden).backward(gradient)
        gradient = hidden.grad
    assert found
    for target in streamed.targets:
        if target.name in found and target.kind != "embedding":
            torch.testing.assert_close(
                found[target.name], target.slice(expected[target.parameter]), atol=2e-4, rtol=1e-3
            )


def _full_gradients(model: Any) -> dict[str, Tensor]:
    model.requires_grad_(True)
    model.zero_grad()
    model(IDS).logits.log_softmax(-1)[..., 5].sum().backward()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    model.zero_grad()
    return gradients


def test_coded_model_runs_as_the_model(family: tuple[Any, Checkpoint]) -> None:
    model, checkpoint = family
    streamed = StreamedModel(checkpoint)
    codes = {target.name: Dense(streamed.weight(target)) for target in streamed.targets}
    coded = coded_model(checkpoint.config, codes, dict(streamed.others()))
    with torch.no_grad():
        expected = model(IDS).logits
        torch.testing.assert_close(coded(IDS).logits, expected, atol=1e-5, rtol=1e-5)
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        text = model.generate(IDS[:1, :8], **options)
        assert torch.equal(coded.generate(IDS[:1, :8], **options), text)
        target = next(target for target in streamed.targets if target.block == 1)
        swap(coded, target, Dense(torch.zeros(target.shape)))
        assert not torch.allclose(coded(IDS).logits, expected, atol=1e-3)
        swap(coded, target, codes[target.name])
        torch.testing.assert_close(coded(IDS).logits, expected, atol=1e-5, rtol=1e-5)
