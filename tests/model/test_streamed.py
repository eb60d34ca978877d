"""What streaming keeps in memory, slices of tall matrices, substitutes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from pliant.codes import Dense
from pliant.errors import CorruptError, PliantError
from pliant.model import StreamedModel, Target, code_of, coded_model, open_checkpoint, swap
from tests.model.tiny import configurations, save

IDS = torch.randint(3, 320, (2, 12), generator=torch.Generator().manual_seed(1))


def deep(directory: Path, **options: Any) -> Any:
    config = configurations()["llama"]
    config.num_hidden_layers = 24
    return save(config, directory, **options)


def loaded(streamed: StreamedModel) -> list[int]:
    """Decoder layers any parameter of which is in memory."""
    layers = [streamed.module.get_submodule(path) for path in streamed.blocks]
    return [
        index
        for index, layer in enumerate(layers)
        if any(not parameter.is_meta for parameter in layer.parameters())
    ]


def test_one_block_in_memory_at_a_time(tmp_path: Path) -> None:
    deep(tmp_path)
    streamed = StreamedModel(open_checkpoint(tmp_path))
    assert loaded(streamed) == []
    seen: list[list[int]] = []
    with streamed.linear_calls(lambda target, x, y: seen.append(loaded(streamed))):
        streamed.capture(IDS, lambda index, hidden: seen.append(loaded(streamed)))
    assert max(map(len, seen)) == 1
    assert {index for layers in seen for index in layers} == set(range(24))
    assert loaded(streamed) == []


def test_resident_blocks_stay(tmp_path: Path) -> None:
    model = deep(tmp_path)
    streamed = StreamedModel(open_checkpoint(tmp_path), resident=True)
    with torch.no_grad():
        expected = model(IDS).logits
    for _ in range(2):
        torch.testing.assert_close(streamed.logits(IDS), expected, atol=1e-5, rtol=1e-5)
        assert len(loaded(streamed)) == 24


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "phi3"])
def test_weights_of_resident_layers_are_those_on_disk(family: str, tmp_path: Path) -> None:
    save(configurations()[family], tmp_path)
    read = StreamedModel(open_checkpoint(tmp_path))
    held = StreamedModel(open_checkpoint(tmp_path), resident=True)
    held.capture(IDS)
    expected = held.logits(IDS)
    for target in held.targets:
        found = held.weight(target)
        assert torch.equal(found, read.weight(target))
        assert found.is_contiguous()
        found.zero_()
    assert torch.equal(held.logits(IDS), expected), "what is handed out is a copy"
    with held.substitute(lambda target: torch.zeros(target.shape)):
        held.capture(IDS)
        for target in held.targets:
            assert torch.equal(held.weight(target), read.weight(target))


def test_block_is_freed_after_an_error(tmp_path: Path) -> None:
    deep(tmp_path)
    streamed = StreamedModel(open_checkpoint(tmp_path))
    with pytest.raises(IndexError), streamed.block(3) as module:
        module.get_parameter("mlp.up_proj.weight")[1000]
    assert loaded(streamed) == []


def test_bfloat16_checkpoint_computes_in_float32(tmp_path: Path) -> None:
    model = save(configurations()["llama_tied"], tmp_path / "a").bfloat16()
    model.save_pretrained(tmp_path / "b")
    streamed = StreamedModel(open_checkpoint(tmp_path / "b"))
    wide = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32)
    with torch.no_grad():
        expected = wide(IDS).logits
    logits = streamed.logits(IDS)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    head = streamed.module.get_output_embeddings().weight
    assert head.tensor.dtype == torch.bfloat16


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def tall(request: Any, tmp_path: Path) -> tuple[Any, StreamedModel]:
    config = configurations()["llama"]
    config.vocab_size, config.tie_word_embeddings = 8200, request.param
    model = save(config, tmp_path)
    return model, StreamedModel(open_checkpoint(tmp_path))


def test_tall_matrices_are_sliced(tall: tuple[Any, StreamedModel]) -> None:
    model, streamed = tall
    outer = [target for target in streamed.targets if target.block is None]
    slices = ["[0:4096]", "[4096:8200]"]
    names = ["model.embed_tokens.weight"]
    names += [] if model.config.tie_word_embeddings else ["lm_head.weight"]
    assert [t.name for t in outer] == [name + part for name in names for part in slices]
    tied = ("lm_head.weight",) if model.config.tie_word_embeddings else ()
    assert outer[0].tied == tied
    embedding = model.get_input_embeddings().weight
    assert torch.equal(streamed.weight(outer[1]), embedding[4096:])


def test_calls_and_gradients_of_row_slices(tall: tuple[Any, StreamedModel]) -> None:
    model, streamed = tall
    final = streamed.capture(IDS).requires_grad_(True)
    gradients: dict[str, Tensor] = {}

    def on_linear(target: Target, x: Tensor, y: Tensor) -> None:
        y.register_hook(lambda gradient: gradients.__setitem__(target.name, gradient))

    with streamed.linear_calls(on_linear):
        logits = streamed.tail(final)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(IDS).logits, atol=1e-5, rtol=1e-5)
    logits.log_softmax(-1)[..., 5].sum().backward()
    whole = logits.detach().requires_grad_(True)
    whole.log_softmax(-1)[..., 5].sum().backward()
    assert whole.grad is not None
    found = torch.cat([gradients[t.name] for t in streamed.targets if t.name in gradients], dim=-1)
    torch.testing.assert_close(found, whole.grad.view(-1, 8200))
    again = final.detach().requires_grad_(True)
    model.lm_head(model.model.norm(again)).log_softmax(-1)[..., 5].sum().backward()
    torch.testing.assert_close(final.grad, again.grad, atol=1e-5, rtol=1e-4)


def test_coded_row_slices_swap_alone(tall: tuple[Any, StreamedModel]) -> None:
    model, streamed = tall
    codes = {target.name: Dense(streamed.weight(target)) for target in streamed.targets}
    coded = coded_model(streamed.config, codes, dict(streamed.others()))
    ids = torch.tensor([[3, 5000, 8199, 3, 4095, 4096]])
    with torch.no_grad():
        torch.testing.assert_close(coded(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    last = [target for target in streamed.targets if target.block is None][-1]
    swap(coded, last, Dense(torch.zeros(last.shape)))
    logits = coded(ids).logits
    assert bool((logits[..., 4096:] == 0).all())
    assert bool((logits[..., :4096] != 0).any())
    with streamed.substitute(lambda t: torch.zeros(t.shape) if t.name == last.name else None):
        torch.testing.assert_close(streamed.logits(ids), logits, atol=1e-5, rtol=1e-5)


def test_linear_calls_work_on_coded_models(tall: tuple[Any, StreamedModel]) -> None:
    _, streamed = tall
    codes = {target.name: Dense(streamed.weight(target)) for target in streamed.targets}
    coded = coded_model(streamed.config, codes, dict(streamed.others()))
    seen: set[str] = set()
    with torch.no_grad(), streamed.linear_calls(lambda target, x, y: seen.add(target.name)):
        logits = coded(IDS).logits
    torch.testing.assert_close(logits, coded(IDS).logits)
    head = {t.name for t in streamed.targets if t.kind == "head" or t.tied}
    assert seen == head | {t.name for t in streamed.targets if t.kind == "linear"}


@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("resident", [False, True])
def test_substitutes_are_used_and_undone(tmp_path: Path, family: str, resident: bool) -> None:
    model = save(configurations()[family], tmp_path)
    streamed = StreamedModel(open_checkpoint(tmp_path), resident=resident)
    original = streamed.logits(IDS)
    every_other = {target.name for target in streamed.targets[::2]}

    def halved(target: Target) -> Tensor | None:
        return streamed.weight(target) / 2 if target.name in every_other else None

    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for target in streamed.targets[::2]:
            target.slice(parameters[target.parameter]).div_(2)
        expected = model(IDS).logits
    with streamed.substitute(halved):
        torch.testing.assert_close(streamed.logits(IDS), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(streamed.logits(IDS), original)


def test_returned_tensor_replaces_the_output(tmp_path: Path) -> None:
    model = save(configurations()["llama"], tmp_path)
    streamed = StreamedModel(open_checkpoint(tmp_path))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
        expected = model(IDS).logits

    def on_linear(target: Target, x: Tensor, y: Tensor) -> Tensor | None:
        return torch.zeros_like(y) if target.block == 1 and target.role == "down_proj" else None

    with streamed.linear_calls(on_linear):
        torch.testing.assert_close(streamed.logits(IDS), expected, atol=1e-5, rtol=1e-5)


def test_small_matrices_are_left_alone(tmp_path: Path) -> None:
    config = transformers.Qwen2Config(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = save(config, tmp_path)
    streamed = StreamedModel(open_checkpoint(tmp_path))
    assert {t.role for t in streamed.targets if t.block == 0} == {
        "q_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    others = dict(streamed.others())
    assert "model.layers.0.self_attn.k_proj.weight" in others
    assert torch.equal(others["model.norm.weight"], model.model.norm.weight)


def test_coded_model_refuses_what_does_not_fit(tmp_path: Path) -> None:
    save(configurations()["llama"], tmp_path)
    streamed = StreamedModel(open_checkpoint(tmp_path))
    codes = {target.name: Dense(streamed.weight(target)) for target in streamed.targets}
    others = dict(streamed.others())
    first, last = streamed.targets[0], streamed.targets[-2]
    with pytest.raises(CorruptError, match=r"no code for target .*embed_tokens"):
        coded_model(tmp_path, {k: v for k, v in codes.items() if k != first.name}, others)
    with pytest.raises(CorruptError, match="shape"):
        coded_model(tmp_path, codes | {first.name: codes[last.name]}, others)
    with pytest.raises(CorruptError, match=r"no tensor for 'model\.norm\.weight'"):
        coded_model(tmp_path, codes, {k: v for k, v in others.items() if "model.norm" not in k})
    model = coded_model(tmp_path, codes, others)
    assert code_of(model, last) is codes[last.name]
    with pytest.raises(CorruptError, match="cannot replace"):
        swap(model, last, Dense(torch.zeros(3, 3)))
    with pytest.raises(PliantError, match="no code for a target called 'nothing'"):
        swap(model, "nothing", codes[last.name])


def test_coded_model_holds_only_its_codes(tmp_path: Path) -> None:
    save(configurations()["llama_tied"], tmp_path)
    streamed = StreamedModel(open_checkpoint(tmp_path))
    codes = {target.name: Dense(streamed.weight(target).half()) for target in streamed.targets}
    others = dict(streamed.others())
    model = coded_model(tmp_path, codes, others)
    assert {name for name, _ in model.named_parameters()} == set(others)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    model.to(torch.bfloat16)
    assert model(IDS).logits.dtype == torch.bfloat16
    assert code_of(model, streamed.targets[0]).decode(torch.float16).dtype == torch.float16
