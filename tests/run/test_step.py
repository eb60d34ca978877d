"""The native step gives what transformers' forward gives."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from pliant.cache import DenseCache
from pliant.kernels import fake_quantize_activations, rounded_activations
from pliant.kernels.cpu.build import library
from pliant.kernels.cpu.structs import Unsuited
from pliant.model import code_of, coded_model, find_targets, swap
from pliant.run import load
from pliant.run.step import NativeStep
from tests.codes.forms import group_levels

from ..ladder.tiny import group_int

pytestmark = pytest.mark.skipif(library() is None, reason="there is no C++ compiler")

SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 256, "initializer_range": 0.2,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
        "original_max_position_embeddings": 64}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama biased": LlamaConfig(
        **SIZES, attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3
    ),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**(SIZES | {"num_attention_heads": 4}), rope_parameters=YARN),
    "qwen3": Qwen3Config(**SIZES),
}


def coded(config, bits: int = 4):
    """A random model held as codes of several forms."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    targets = find_targets(model)
    codes = {t.name: group_int(t.slice(model.get_parameter(t.parameter)), bits) for t in targets}
    taken = {t.parameter for t in targets}
    others = {n: p.data for n, p in model.named_parameters() if n not in taken}
    return coded_model(config, codes, others)


@torch.inference_mode()
def worst(model, step, tokens: int = 12, prompt: int = 9) -> float:
    """The largest difference of logits between the step and the forward, relative."""
    ids = torch.randint(0, 97, (1, prompt + tokens))
    ours, theirs = (DenseCache(model.config, prompt + tokens + 3) for _ in range(2))
    for cache in (ours, theirs):
        type(model).forward(model, input_ids=ids[:, :prompt], past_key_values=cache)
    logits, found = torch.empty(model.config.vocab_size), 0.0
    for token in ids[0, prompt:].tolist():
        assert step(token, ours, logits)
        expected = (
            type(model)
            .forward(model, input_ids=torch.tensor([[token]]), past_key_values=theirs)
            .logits[0, -1]
        )
        found = max(found, float((logits - expected).abs().max() / expected.abs().max()))
    assert ours.length == theirs.length
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_families(name: str, monkeypatch) -> None:
    monkeypatch.setenv("PLIANT_NATIVE", "exact")
    model = coded(CONFIGS[name])
    assert worst(model, NativeStep(model).run) < 1e-4
    monkeypatch.delenv("PLIANT_NATIVE")
    assert worst(model, NativeStep(model).run) < 2e-3  # keys on the edge of two bfloat16 numbers
    monkeypatch.setenv("PLIANT_NATIVE", "int8")
    assert worst(model, NativeStep(model).run) < 0.3  # random weights amplify what is rounded


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_members_share_a_long_cache(threads: int, monkeypatch) -> None:
    monkeypatch.setenv("PLIANT_NATIVE", "exact")
    before = torch.get_num_threads()
    more = {"hidden_size": 96, "num_attention_heads": 6, "max_position_embeddings": 999}
    model = coded(LlamaConfig(**(SIZES | more)))
    try:
        torch.set_num_threads(threads)
        for prompt in (61, 600):
            assert worst(model, NativeStep(model).run, 4, prompt) < 1e-4
    finally:
        torch.set_num_threads(before)


def test_every_size_of_an_artifact(artifact, monkeypatch) -> None:
    monkeypatch.setenv("PLIANT_NATIVE", "exact")
    model = load(artifact, weights=120_000, context=64)
    model.config.vocab_size = 260
    for weights in (60_000, 90_000, 160_000, 10**6):
        model.resize(weights=weights)
        assert worst(model, model.step) < 1e-4


def test_the_forward_takes_the_step_for_one_token(artifact, monkeypatch) -> None:
    monkeypatch.delenv("PLIANT_NATIVE", raising=False)
    model, taken = load(artifact, weights=120_000, context=64), []
    run = NativeStep.run
    monkeypatch.setattr(NativeStep, "run", lambda *a: taken.append(run(*a)) or taken[-1])
    ids = torch.randint(3, 260, (1, 10))
    answer = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert taken == [True] * 5
    monkeypatch.setattr(NativeStep, "run", lambda *a: False)
    assert torch.equal(
        model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None), answer
    )


def test_what_changes_is_noticed(artifact, monkeypatch) -> None:
    monkeypatch.delenv("PLIANT_NATIVE", raising=False)
    model = load(artifact, weights=120_000, context=64)
    assert worst(model, model.step) < 1e-4
    first = model._step
    target = "model.layers.0.mlp.up_proj"
    name = next(n for n in model.coded_weights if n.startswith(target))
    out, width = code_of(model, name).shape
    swap(model, name, group_levels(out, width, 3, 32))
    assert not first.current()
    assert worst(model, model.step) < 1e-4
    assert model._step is not first
    logits, cache = torch.empty(260), model.new_cache()
    assert not model.step(5, cache, logits), "an empty cache is the forward's to fill"
    model(input_ids=torch.tensor([[4, 5]]), past_key_values=cache)
    with rounded_activations(fake_quantize_activations):
        assert not model.step(5, cache, logits)
    hook = model.model.layers[1].mlp.register_forward_hook(lambda *a: None)
    assert not model.step(5, cache, logits)
    hook.remove()
    assert not model.step(260, cache, logits), "no such token"
    assert model.step(5, cache, logits)
    cache.layers[0].length = 64
    assert not model.step(5, cache, logits), "layers of different lengths"


def test_other_models_are_left_to_transformers() -> None:
    sliding = MistralConfig(**SIZES, sliding_window=8)
    model = coded(sliding)
    step = NativeStep(model)
    cache = DenseCache(sliding, 64)
    with torch.inference_mode():
        model(input_ids=torch.tensor([[1, 2, 3]]), past_key_values=cache)
    assert not step.run(4, cache, torch.empty(97))
    gelu = coded(LlamaConfig(**SIZES, hidden_act="gelu"))
    with pytest.raises(Unsuited):
        NativeStep(gelu)
