"""A prompt that runs natively gives what transformers' forward gives."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from pliant.cache import DenseCache
from pliant.codes import Dense
from pliant.errors import PliantError
from pliant.kernels.cpu import PIECE, multiplies_words
from pliant.kernels.cpu.build import library
from pliant.methods.quantize.rtn import rtn
from pliant.model import coded_model, find_targets
from pliant.observe.statistics import Statistics
from pliant.run import load
from pliant.run.step import NativeStep

from .test_step import CONFIGS, SIZES, coded

pytestmark = pytest.mark.skipif(library() is None, reason="there is no C++ compiler")

ODD = LlamaConfig(**(SIZES | {"hidden_size": 72, "intermediate_size": 91, "head_dim": 10}))
MORE = CONFIGS | {"odd widths": ODD}


def held(name: str):
    """A random model of this configuration held as codes."""
    if name != "odd widths":
        return coded(CONFIGS[name])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(ODD)
    codes = {}
    for i, target in enumerate(find_targets(model)):
        weight = target.slice(model.get_parameter(target.parameter)).detach()
        code = rtn(weight, Statistics(), bits=3 + i % 5, group_size=(16, 24, 32)[i % 3])
        codes[target.name] = Dense(weight.bfloat16()) if i % 4 == 3 else code
    taken = {target.parameter for target in find_targets(model)}
    others = {n: p.data for n, p in model.named_parameters() if n not in taken}
    return coded_model(ODD, codes, others)


@pytest.fixture(params=[0, 1, 2], ids=["plain", "avx2", "avx512"])
def isa(request):
    native = library()
    name = native.pliant_use(request.param).decode()
    if name != ["plain", "avx2", "avx512"][request.param]:
        native.pliant_use(2)
        pytest.skip(f"level {request.param} is not here")
    yield name
    native.pliant_use(2)


def relative(found, expected) -> float:
    return float((found - expected).norm() / expected.norm())


@torch.inference_mode()
def differences(model, config, pieces, keep: int | None) -> list[float]:
    """Of the logits after each piece of a prompt and of what the cache holds in the end."""
    prompt, found = NativeStep(model), []
    ours, theirs = (DenseCache(config, 400) for _ in range(2))
    for n in pieces:
        ids = torch.randint(0, config.vocab_size, (1, n))
        last = min(keep or n, n)
        expected = type(model).forward(
            model, input_ids=ids, past_key_values=theirs, logits_to_keep=keep or 0
        )
        if last == 1:
            logits = torch.empty(config.vocab_size)
            assert prompt.prompt(ids[0], ours, logits)
        else:
            states = torch.empty(last, config.hidden_size)
            assert prompt.prompt(ids[0], ours, states)
            logits = model.lm_head(states)
        found.append(relative(logits.view(-1), expected.logits.view(-1)))
        assert ours.length == theirs.length
    for one, other in zip(ours.layers, theirs.layers, strict=True):
        for side in ("keys", "values"):
            mine, yours = (getattr(x, side)[:, :, : ours.length].float() for x in (one, other))
            found.append(relative(mine, yours))
    return found


@pytest.mark.parametrize("name", MORE)
def test_families(isa: str, name: str) -> None:
    model = held(name)
    # The cache's 16 bits may round either way, and random weights amplify that.
    assert max(differences(model, MORE[name], (17, 1, 40, 128), 1)) < 2e-2
    assert max(differences(model, MORE[name], (45, 20), None)) < 2e-2


def test_a_piece_in_exact_arithmetic_of_the_cache() -> None:
    """Without anything in the cache of 16 bits that could round otherwise: one token."""
    config = CONFIGS["llama"]
    assert differences(coded(config), config, (1,), 1)[0] < 1e-3


@pytest.mark.parametrize("keep", [1, 3, 20, None])
def test_more_tokens_than_a_piece(keep) -> None:
    config = CONFIGS["llama"]
    assert max(differences(coded(config), config, (PIECE + 40, 30), keep)) < 2e-2


def test_threads_change_nothing() -> None:
    config = CONFIGS["qwen3"]
    model, before, found = coded(config), torch.get_num_threads(), []
    ids = torch.randint(0, 97, (70,))
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            logits = torch.empty(97)
            assert NativeStep(model).prompt(ids, DenseCache(config, 100), logits)
            found.append(logits)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(logits, found[0]) for logits in found)


needs_words = pytest.mark.skipif(
    library() is None or not multiplies_words(), reason="torch is faster here"
)


@needs_words
def test_the_forward_takes_it_where_it_can(artifact, monkeypatch) -> None:
    model, taken = load(artifact, weights=120_000, context=64), []
    run = NativeStep.prompt
    monkeypatch.setattr(NativeStep, "prompt", lambda *a: taken.append(run(*a)) or taken[-1])
    ids = torch.randint(3, 260, (1, 40))

    def call(count: int = 1, **options):
        taken.clear()
        cache = options.pop("past_key_values", model.new_cache())
        with torch.inference_mode():
            output = model(input_ids=ids, past_key_values=cache, **options)
        assert taken == [True] * count
        return output.logits

    everything = call()
    assert everything.shape == (1, 40, 260)
    assert torch.equal(call(logits_to_keep=40), everything)
    torch.testing.assert_close(call(logits_to_keep=2), everything[:, -2:], rtol=0, atol=1e-4)
    torch.testing.assert_close(call(logits_to_keep=1), everything[:, -1:], rtol=0, atol=1e-3)
    call(attention_mask=torch.ones(1, 40, dtype=torch.int64), position_ids=torch.arange(40)[None])
    call(0, attention_mask=(torch.arange(40) > 3).long()[None])
    call(0, position_ids=torch.arange(1, 41)[None])
    call(0, use_cache=False)
    call(0, past_key_values=None)
    hook = model.model.layers[1].register_forward_hook(lambda *a: None)
    call(0)
    hook.remove()
    wide = load(artifact, weights=120_000, context=64, batch=2)
    wide(input_ids=ids.expand(2, -1), past_key_values=wide.new_cache())
    assert not taken


@needs_words
def test_what_does_not_fit_is_refused_as_ever(artifact) -> None:
    model = load(artifact, weights=120_000, context=64)
    cache = model.new_cache()
    model(input_ids=torch.full((1, 40), 5), past_key_values=cache)
    with pytest.raises(PliantError, match="planned context of 64"):
        model(input_ids=torch.full((1, 40), 5), past_key_values=cache)
    assert cache.length == 40
    with pytest.raises(IndexError):
        model(input_ids=torch.full((1, 20), 260), past_key_values=model.new_cache())
