"""Grouped attention gives what transformers' own gives, for every family."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from pliant.cache import DenseCache
from pliant.codes import Dense
from pliant.model import coded_model, find_targets
from pliant.model.attention import GROUPED_SDPA, use_grouped_sdpa
from pliant.model.heap import release

from .tiny import configurations

torch.set_num_threads(1)
SMALL = {
    "vocab_size": 97, "hidden_size": 96, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


@torch.inference_mode()
def answers(model, cache) -> torch.Tensor:
    """Logits of a prompt in three pieces and one token more."""
    ids = torch.arange(24)[None] * 7 % 97
    pieces = [model(part, past_key_values=cache).logits for part in ids.split([9, 8, 6, 1], dim=1)]
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config])
def test_grouped_attention_is_the_expanded_one(kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**SMALL)).eval()
    plain = answers(model, DenseCache(model.config, 24))
    use_grouped_sdpa(model)
    assert model.config._attn_implementation == GROUPED_SDPA
    torch.testing.assert_close(answers(model, DenseCache(model.config, 24)), plain)


@torch.inference_mode()
def test_prompts_of_shared_heads_are_not_expanded(monkeypatch):
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL)).eval()
    use_grouped_sdpa(model)
    seen = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, *args, **kwargs):
        seen.append((query.shape[1], key.shape[1]))
        return attend(query, key, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    cache = DenseCache(model.config, 24)
    for part in torch.zeros(1, 24, dtype=torch.long).split(8, dim=1):
        model(part, past_key_values=cache)
    assert set(seen) == {(6, 2)}


@pytest.mark.parametrize("name", sorted(configurations()))
def test_a_coded_model_of_any_family_computes_what_transformers_does(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(configurations()[name])).eval()
    targets = find_targets(model)
    codes = {t.name: Dense(t.slice(model.get_parameter(t.parameter)).detach()) for t in targets}
    taken = {t.parameter for t in targets}
    others = {n: p.detach() for n, p in model.named_parameters() if n not in taken}
    others |= {n: b for n, b in model.named_buffers() if n in model.state_dict()}
    coded = coded_model(model.config, codes, others)
    for (path, buffer), (same, other) in zip(
        sorted(model.named_buffers()), sorted(coded.named_buffers()), strict=True
    ):
        assert path == same
        assert torch.equal(buffer, other), path  # no weight initialisation ran
    ids = torch.arange(20)[None] % 31
    with torch.inference_mode():
        expected = model(ids).logits
        torch.testing.assert_close(coded(ids).logits, expected, atol=1e-4, rtol=1e-3)
        cache = DenseCache(model.config, 20, dtype=torch.float32)
        chunks = [coded(part, past_key_values=cache).logits for part in ids.split(7, dim=1)]
    torch.testing.assert_close(torch.cat(chunks, dim=1), expected, atol=1e-4, rtol=1e-3)


def test_release_can_be_called_anywhere():
    release()
