import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DynamicCache,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTBigCodeConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    Qwen2Config,
)

from pliant.budget import Budget
from pliant.errors import BudgetError, UnsupportedModelError
from pliant.plan import Breakdown, activation_bytes, attention_shapes, kv_cache_bytes
from pliant.plan.memory import LIBRARY_BYTES, SCRATCH_BYTES, weights_budget

SMOLLM2 = LlamaConfig(
    hidden_size=576,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    intermediate_size=1536,
    vocab_size=49152,
)
MIB = 1 << 20


def test_kv_cache_of_smollm2_is_what_the_issue_counts():
    assert kv_cache_bytes(SMOLLM2, 2048, 1) == 30 * 2 * 3 * 64 * 2048 * 2 == 45 * MIB
    assert kv_cache_bytes(SMOLLM2, 2048, 3, dtype_bytes=1) == 3 * 45 * MIB // 2


@pytest.mark.parametrize(
    "model",
    [
        lambda: LlamaForCausalLM(
            LlamaConfig(
                vocab_size=64,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=16,
            )
        ),
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4)),
    ],
    ids=["llama with its own head_dim", "gpt2"],
)
def test_kv_cache_is_what_transformers_holds(model):
    model = model()
    cache = DynamicCache()
    with torch.inference_mode():
        model(torch.zeros(2, 9, dtype=torch.long), past_key_values=cache)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert kv_cache_bytes(model.config, 9, 2, dtype_bytes=4) == held


def test_sliding_layers_hold_no_more_than_their_window():
    config = Gemma3TextConfig(num_hidden_layers=12, sliding_window=512)
    full = config.layer_types.count("full_attention")
    assert 0 < full < 12
    per_token = 2 * config.num_key_value_heads * config.head_dim * 2
    assert kv_cache_bytes(config, 4096, 1) == per_token * (full * 4096 + (12 - full) * 512)
    assert kv_cache_bytes(config, 100, 1) == per_token * 12 * 100
    # Qwen2 names a window that it does not use, Mixtral's applies to every layer
    assert all(s.window is None for s in attention_shapes(Qwen2Config(sliding_window=64)))
    assert all(s.window == 64 for s in attention_shapes(MixtralConfig(sliding_window=64)))


@pytest.mark.parametrize(
    ("config", "layers", "cached_values"),
    [
        (FalconConfig(num_hidden_layers=2, multi_query=True), 2, 2 * 64),
        (GPTBigCodeConfig(n_layer=2, n_embd=768, n_head=12), 2, 2 * 64),
        (DeepseekV3Config(num_hidden_layers=2), 2, 128 * (128 + 64 + 128)),
    ],
    ids=["falcon", "gpt_bigcode", "deepseek"],
)
def test_shapes_of_less_common_attention(config, layers, cached_values):
    shapes = attention_shapes(config)
    assert len(shapes) == layers
    assert {s.cached_values for s in shapes} == {cached_values}


def test_activations_are_those_measured_on_smollm2():
    """Growth of resident memory over codes, cache and ladder.json (2.4 MiB there): float32."""
    measured = {1024: 11.6, 2048: 13.3, 4096: 17.7, 8192: 28.3}
    for context, mib in measured.items():
        assert activation_bytes(SMOLLM2, context, 1) / MIB == pytest.approx(mib, abs=1)


def test_activations_grow_with_what_they_hold():
    base = activation_bytes(SMOLLM2, 2048, 1)
    assert base > LIBRARY_BYTES + SCRATCH_BYTES
    assert activation_bytes(SMOLLM2, 4096, 1) > base
    assert activation_bytes(SMOLLM2, 2048, 2) > base
    assert activation_bytes(SMOLLM2, 2048, 1, dtype_bytes=2) < base
    assert activation_bytes(SMOLLM2, 64, 1) == activation_bytes(SMOLLM2, 64, 1, prefill_chunk=999)


def test_a_budget_that_the_cache_alone_exceeds_says_what_to_lower():
    assert weights_budget(SMOLLM2, Budget(128 * MIB, 2048)) == 128 * MIB - 45 * MIB - (
        activation_bytes(SMOLLM2, 2048, 1)
    )
    with pytest.raises(BudgetError, match=r"KV cache takes 360\.0 MiB.*lower --context or --batch"):
        weights_budget(SMOLLM2, Budget(128 * MIB, 8192, 2))


def test_a_configuration_without_a_language_model_is_named():
    class Strange:
        model_type = "strange"

    with pytest.raises(UnsupportedModelError, match="'strange' has no 'num_hidden_layers'"):
        kv_cache_bytes(Strange(), 10, 1)


def test_breakdown_adds_up():
    parts = Breakdown(50, 20, 10, 5, 15)
    assert parts.total == 85
    assert parts.as_dict() == {
        "weights": 50,
        "embeddings": 20,
        "kv_cache": 10,
        "activations": 5,
        "free": 15,
    }
