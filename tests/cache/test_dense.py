"""The dense cache changes where keys and values live, and nothing else."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig
from transformers.cache_utils import DynamicCache

from pliant.cache import DenseCache
from pliant.errors import PliantError

torch.set_num_threads(1)


def llama(**options):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, **options,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def mistral(window):
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, sliding_window=window,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def cached(model, ids, cache, pieces, **kwargs):
    found, start = [], 0
    for size in pieces:
        found.append(model(ids[:, start : start + size], past_key_values=cache, **kwargs).logits)
        start += size
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("model", [llama(), mistral(6), mistral(40)], ids=["full", "w6", "w40"])
@pytest.mark.parametrize("pieces", [[20], [5, 1, 1, 8, 1, 4], [1] * 20, [13, 7], [6, 5, 1, 8]])
@torch.no_grad()
def test_cached_forward_is_the_uncached_one_in_float32(model, pieces):
    ids = torch.randint(0, 97, (2, 20))
    cache = DenseCache(model.config, 24, 2, dtype=torch.float32)
    plain = model(ids, use_cache=False).logits
    torch.testing.assert_close(cached(model, ids, cache, pieces), plain, atol=2e-6, rtol=1e-5)
    same = cached(model, ids, DynamicCache(config=model.config), pieces)
    cache.reset()
    assert torch.equal(cached(model, ids, cache, pieces), same)


@pytest.mark.parametrize("model", [llama(), mistral(6)], ids=["full", "sliding"])
@torch.no_grad()
def test_sixteen_bit_storage_agrees_within_rounding(model):
    ids = torch.randint(0, 97, (1, 20))
    plain = model(ids, use_cache=False).logits
    found = cached(model, ids, DenseCache(model.config, 20), [7, 1, 9, 3])
    assert found.dtype == torch.float32
    assert (found - plain).abs().max() < 0.02 * plain.abs().max()


@pytest.mark.parametrize("model", [llama(), mistral(6)], ids=["full", "sliding"])
@torch.no_grad()
def test_how_the_prompt_is_cut_does_not_matter_in_sixteen_bits(model):
    ids = torch.randint(0, 97, (1, 20))
    one = cached(model, ids, DenseCache(model.config, 20), [20])
    many = cached(model, ids, DenseCache(model.config, 20), [3, 1, 10, 6])
    torch.testing.assert_close(one, many, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_left_padding_is_masked():
    for model in (llama(), mistral(6)):
        ids = torch.randint(1, 97, (2, 12))
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        expected = cached_masked(model, ids, mask, DynamicCache(config=model.config))
        found = cached_masked(
            model, ids, mask, DenseCache(model.config, 12, 2, dtype=torch.float32)
        )
        torch.testing.assert_close(found, expected)


def cached_masked(model, ids, mask, cache):
    parts = [(0, 9), (9, 10), (10, 12)]
    return torch.cat(
        [
            model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache).logits
            for a, b in parts
        ],
        dim=1,
    )


@torch.no_grad()
def test_bytes_are_exact_and_do_not_grow():
    model = llama()
    cache = DenseCache(model.config, 32, 3)
    assert cache.nbytes == 0
    model(torch.randint(0, 97, (3, 2)), past_key_values=cache)
    assert cache.nbytes == 2 * 2 * 3 * 2 * 32 * 16 * 2  # layers, k/v, batch, heads, ctx, dim, bf16
    where = cache.layers[0].keys.data_ptr()
    model(torch.randint(0, 97, (3, 30)), past_key_values=cache)
    assert cache.nbytes == 2 * 2 * 3 * 2 * 32 * 16 * 2
    assert cache.layers[0].keys.data_ptr() == where
    sliding = mistral(6)
    cache = DenseCache(sliding.config, 32, 1)
    sliding(torch.randint(0, 97, (1, 20)), past_key_values=cache)
    assert cache.nbytes == 2 * 2 * 2 * 6 * 16 * 2


@torch.no_grad()
def test_too_many_tokens_or_sequences_are_refused_and_nothing_is_lost():
    model = llama()
    cache = DenseCache(model.config, 8)
    with pytest.raises(PliantError, match="batch=2"):
        model(torch.zeros(2, 3, dtype=torch.long), past_key_values=cache)
    model(torch.zeros(1, 6, dtype=torch.long), past_key_values=cache)
    with pytest.raises(PliantError, match="9 tokens exceed the planned context of 8"):
        model(torch.zeros(1, 3, dtype=torch.long), past_key_values=cache)
    assert cache.length == 6
    model(torch.zeros(1, 2, dtype=torch.long), past_key_values=cache)


@torch.no_grad()
def test_cropped_tokens_are_forgotten():
    model = llama()
    ids = torch.randint(0, 97, (1, 10))
    cache = DenseCache(model.config, 10, dtype=torch.float32)
    model(ids, past_key_values=cache)
    cache.crop(-4)
    found = model(ids[:, 6:], past_key_values=cache).logits
    torch.testing.assert_close(found, model(ids).logits[:, 6:], atol=2e-6, rtol=1e-5)


def test_beam_search_runs():
    model = llama()
    ids = torch.randint(0, 97, (1, 5))
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    cache = DenseCache(model.config, 12, 3, dtype=torch.float32)
    found = model.generate(ids, past_key_values=cache, **options)
    assert torch.equal(found, model.generate(ids, **options))


@torch.inference_mode()
def test_all_layers_cast_into_one_buffer():
    for model in (llama(), mistral(6)):
        ids = torch.randint(0, 97, (1, 20))
        cache = DenseCache(model.config, 20)
        found = cached(model, ids, cache, [7, 1, 9, 3])
        keys, values = cache.casts
        assert keys.nbytes == values.nbytes  # one layer's, of the two
        assert keys.nbytes <= 2 * 20 * 16 * 4
        cache.reset()
        for layer in cache.layers:
            layer.casts = None
        assert torch.equal(cached(model, ids, cache, [7, 1, 9, 3]), found)


def test_what_is_differentiated_is_not_overwritten():
    layer = DenseCache(llama().config, 8).layers[0]
    states = torch.randn(1, 2, 3, 16)
    first, _ = layer.update(states, states)
    second, _ = layer.update(states, states)
    assert first.data_ptr() != second.data_ptr()


def test_layers_that_lend_their_keys_share_no_buffer():
    config = llama().config
    config.num_kv_shared_layers = 1
    assert DenseCache(config, 8).casts is None
