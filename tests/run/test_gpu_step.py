"""The captured step gives what transformers' forward gives.

Without a GPU its kernels run in Triton's interpreter, one token at a time and not captured.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("triton")

from pliant.cache import DenseCache
from pliant.codes import Dense, LowRank, Sum
from pliant.kernels import fake_quantize_activations, rounded_activations
from pliant.kernels.cpu.structs import Unsuited
from pliant.model import coded_model, find_targets, swap
from pliant.run import load
from pliant.run.gpu_step import GraphStep
from tests.codes.forms import group_levels

from ..ladder.tiny import group_int
from .test_step import CONFIGS, SIZES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# A narrower cache rounds the newest token's key and value as the reference does, but the
# interpreter cuts what torch rounds to bf16.
ROUNDING = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 5e-2}


@pytest.fixture(autouse=True)
def kernels_are_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLIANT_GPU_KERNELS", "1")
    monkeypatch.setenv("PLIANT_NATIVE", "exact")  # products on a CPU do not round activations


def random_model(config, kinds: str = "int"):
    """A random model held as codes: group integers, or of several kinds."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    codes = {}
    for i, target in enumerate(find_targets(model)):
        weight = target.slice(model.get_parameter(target.parameter)).detach()
        codes[target.name] = group_int(weight, (4, 8, 3)[i % 3])
        if kinds == "mixed" and i % 3 == 1:
            codes[target.name] = Dense(weight.half())
        elif kinds == "mixed" and i % 3 == 2:
            low = LowRank(
                Dense(0.1 * torch.randn(weight.shape[0], 3)),
                Dense(0.1 * torch.randn(3, weight.shape[1])),
            )
            codes[target.name] = Sum((codes[target.name], low))
    taken = {t.parameter for t in find_targets(model)}
    others = {n: p.data for n, p in model.named_parameters() if n not in taken}
    return coded_model(config, codes, others).to(DEVICE)


@torch.inference_mode()
def worst(
    model, step, tokens: int = 3, prompt: int = 9, context: int = 64, dtype=torch.float32
) -> float:
    """The largest difference of logits between the step and the forward, relative."""
    ids = torch.randint(0, 97, (1, prompt + tokens), device=DEVICE)
    forward = type(model).forward  # a running model's call may take a step of its own
    ours, theirs = (DenseCache(model.config, context, dtype=dtype) for _ in range(2))
    for cache in (ours, theirs):
        forward(model, input_ids=ids[:, :prompt], past_key_values=cache)
    logits, found = torch.empty(model.config.vocab_size, device=DEVICE), 0.0
    for token in ids[0, prompt:].tolist():
        assert step(token, ours, logits)
        given = torch.tensor([[token]], device=DEVICE)
        expected = forward(model, input_ids=given, past_key_values=theirs).logits[0, -1]
        found = max(found, float((logits - expected).abs().max() / expected.abs().max()))
    assert ours.length == theirs.length == prompt + tokens
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_families(name: str) -> None:
    model = random_model(CONFIGS[name])
    step = GraphStep(model, tile=16)
    assert worst(model, step.run) < ROUNDING[torch.float32]
    assert step.captured == (DEVICE == "cuda")


@pytest.mark.parametrize("kinds", ["mixed", "levels"])
def test_codes_of_several_kinds(kinds: str) -> None:
    model = random_model(CONFIGS["llama"], kinds)
    if kinds == "levels":
        for name, (weight, part) in model.coded_weights.items():
            swap(model, name, group_levels(*weight.part(part).shape, 3, 32))
    assert worst(model, GraphStep(model).run, 2) < ROUNDING[torch.float32]


@pytest.mark.parametrize("dtype", ROUNDING)
def test_caches_of_other_types(dtype: torch.dtype) -> None:
    model = random_model(CONFIGS["qwen3"])
    assert worst(model, GraphStep(model, tile=16).run, 2, 21, dtype=dtype) < ROUNDING[dtype]


@pytest.mark.parametrize(
    ("prompt", "context"), [(1, 2 + 1), (15, 19), (16, 18), (31, 35), (47, 71), (67, 71)]
)
def test_lengths(prompt: int, context: int) -> None:
    """Up to the last place of the cache, over and at the ends of tiles."""
    model = random_model(CONFIGS["llama"])
    step = GraphStep(model, tile=16)
    assert worst(model, step.run, 2, prompt, context) < ROUNDING[torch.float32]


def test_greedy_is_the_likeliest_token_each_time() -> None:
    model = random_model(CONFIGS["llama"])
    step = GraphStep(model, tile=16)
    caches = [DenseCache(model.config, 40) for _ in range(2)]
    with torch.inference_mode():
        for cache in caches:
            model(input_ids=torch.tensor([[5, 6, 7]], device=DEVICE), past_key_values=cache)
    logits, token, expected = torch.empty(97, device=DEVICE), 8, []
    for _ in range(4):
        assert step.run(token, caches[0], logits)
        token = int(logits.argmax())
        expected.append(token)
    found = step.greedy(8, caches[1], 4)
    assert found is not None
    assert found.tolist() == expected
    assert caches[1].length == caches[0].length == 7
    assert step.greedy(8, caches[1], 34) is None, "more than fit"


def test_what_changes_is_noticed() -> None:
    model = random_model(CONFIGS["llama"])
    step = GraphStep(model)
    logits, cache = torch.empty(97, device=DEVICE), DenseCache(model.config, 64)
    assert not step.run(5, cache, logits), "an empty cache is the forward's to fill"
    with torch.inference_mode():
        model(input_ids=torch.tensor([[4, 5]], device=DEVICE), past_key_values=cache)
    assert not step.run(97, cache, logits), "no such token"
    assert step.run(5, cache, logits)
    hook = model.model.layers[1].mlp.register_forward_hook(lambda *a: None)
    assert not step.run(5, cache, logits)
    hook.remove()
    assert step.run(5, cache, logits)
    assert cache.length == 4
    other = random_model(CONFIGS["qwen3"])
    swap(other, *_code_for(other))
    assert not step.outdated(), "another model's codes are not this one's"
    swap(model, *_code_for(model))
    assert step.outdated()
    assert not step.run(5, cache, logits)
    step = GraphStep(model)
    assert step.run(5, cache, logits)
    model.model.norm.weight = torch.nn.Parameter(torch.ones(64, device=DEVICE))
    assert not step.run(5, cache, logits)
    assert step.outdated()
    cache.layers[0].length = 3
    assert not GraphStep(model).run(5, cache, logits), "layers of different lengths"


def _code_for(model):
    name = next(n for n in model.coded_weights if "layers.0.mlp.up_proj" in n)
    weight, part = model.coded_weights[name]
    return name, group_levels(*weight.part(part).shape, 3, 32)


def test_other_models_are_left_to_transformers() -> None:
    config = type(CONFIGS["llama"])(**SIZES, hidden_act="gelu")
    with pytest.raises(Unsuited):
        GraphStep(random_model(config))


def test_a_running_model_has_one_if_asked(artifact, monkeypatch) -> None:
    model = load(artifact, weights=120_000, context=64).to(DEVICE)
    monkeypatch.delenv("PLIANT_GPU_KERNELS", raising=False)
    assert model.graph_step() is None
    monkeypatch.setenv("PLIANT_GPU_KERNELS", "1")
    first = model.graph_step()
    assert first is not None
    assert model.graph_step() is first
    assert worst(model, first.run, 2) < ROUNDING[torch.float32]
    model.resize(weights=60_000)
    second = model.graph_step()
    assert second is not first
    assert worst(model, second.run, 2) < ROUNDING[torch.float32]
    with rounded_activations(fake_quantize_activations):
        assert model.graph_step() is None


def test_without_a_graph_the_forward_goes_on(monkeypatch, caplog) -> None:
    """Overlap is given up first, then the graph; each is said once."""
    model = random_model(CONFIGS["llama"])
    step, tried = GraphStep(model, early=True), []

    def captured(early: bool) -> None:
        tried.append(early)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(step, "_captured", captured)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    step._capture()
    assert tried == [True, False]
    assert len(caplog.records) == 2
    cache = DenseCache(model.config, 64)
    with torch.inference_mode():
        model(input_ids=torch.tensor([[4, 5]], device=DEVICE), past_key_values=cache)
    assert not step.run(5, cache, torch.empty(97, device=DEVICE))
    assert cache.length == 2
    assert len(caplog.records) == 2
