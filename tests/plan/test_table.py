import json
from itertools import pairwise

import pytest
import torch
from rich.console import Console
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM, MixtralConfig

from pliant.errors import CheckpointError
from pliant.plan import Bandwidth, activation_bytes, kv_cache_bytes, plan, render
from pliant.plan.table import code_bits, count_parameters, largest_context

SPEED = Bandwidth("a test", 1e9)
TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_the_model(tied):
    config = LlamaConfig(tie_word_embeddings=tied, **TINY)
    model = LlamaForCausalLM(config)
    counts = count_parameters(config)
    assert counts.total == sum(p.numel() for p in model.parameters())
    assert counts.embeddings == 512 * 64 * (1 if tied else 2)
    assert counts.others == 5 * 64
    unread = 0 if tied else 512 * 64
    assert counts.read == pytest.approx(1 - unread / (counts.matrices + counts.embeddings))


def test_only_the_chosen_experts_are_read():
    config = MixtralConfig(num_local_experts=4, num_experts_per_tok=1, **TINY)
    counts = count_parameters(config)
    experts = 2 * 4 * 3 * 64 * 96
    unread = experts * 3 / 4 + 512 * 64
    assert counts.read == pytest.approx(1 - unread / (counts.matrices + counts.embeddings))


def test_sizes_include_what_groups_of_64_cost():
    config = LlamaConfig(**TINY)
    table = plan(config, 10 << 20, context=128, speed=SPEED)
    by_bits = {row.bits: row for row in table.rows}
    assert code_bits(4) == 4 + 20 / 64
    assert by_bits[16].weights + by_bits[16].embeddings == 2 * table.parameters.total
    four = by_bits[4]
    assert four.weights == round(table.parameters.matrices * code_bits(4) / 8) + 2 * 320
    cache, activations = kv_cache_bytes(config, 128, 1), activation_bytes(config, 128, 1)
    assert four.total == four.weights + four.embeddings + cache + activations
    read = (four.weights + four.embeddings) * table.parameters.read + cache / 2
    assert four.tokens_per_second == four.ceiling == pytest.approx(1e9 / read)
    assert not table.predicted


def test_smaller_sizes_leave_longer_contexts_and_run_faster():
    rows = plan(LlamaConfig(**TINY), 12 << 20, speed=SPEED).rows
    assert [r.bits for r in rows] == [16, 8, 6, 5, 4, 3, 2]
    for larger, smaller in pairwise(rows):
        assert larger.total > smaller.total
        assert larger.max_context <= smaller.max_context
        assert larger.tokens_per_second < smaller.tokens_per_second


def test_speeds_are_predicted_where_something_predicts_them():
    config = LlamaConfig(**TINY)

    def seconds(bits, position):
        return bits * position * 1e-6

    table = plan(config, 12 << 20, context=100, batch=3, speed=SPEED, seconds=seconds)
    assert table.predicted
    for row in table.rows:
        assert row.tokens_per_second == pytest.approx(3 / (row.bits * 50e-6))
        assert row.ceiling > 0
    some = plan(config, 12 << 20, speed=SPEED, seconds=lambda bits, at: None if bits == 2 else 1.0)
    assert not some.predicted
    assert some.rows[-1].tokens_per_second == some.rows[-1].ceiling


def test_the_longest_context_fits_and_one_more_token_does_not():
    config = LlamaConfig(**TINY)

    def need(context):
        return kv_cache_bytes(config, context, 2) + activation_bytes(config, context, 2)

    left = need(700) + 10
    assert largest_context(config, left, 2, 10_000) == 700
    assert largest_context(config, left, 2, 300) == 300
    assert largest_context(config, need(1) - 1, 2, 300) == 0


def test_a_table_is_data_and_renders(tmp_path):
    LlamaConfig(**TINY).save_pretrained(tmp_path)
    table = plan(tmp_path, 12 << 20, speed=SPEED)
    again = json.loads(json.dumps(table.as_dict()))
    assert again["rows"][0]["bits"] == 16
    assert again["parameters"]["total"] == table.parameters.total
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(table))
    text = console.export_text()
    assert "longest context" in text
    assert "12.0 MiB budget" in text


def test_without_a_budget_the_machine_is_the_budget():
    table = plan(GPT2Config(n_layer=1), speed=SPEED)
    assert not table.given
    assert table.memory > 0
    assert table.rows[0].fits


def test_no_weight_is_allocated(monkeypatch):
    huge = LlamaConfig(hidden_size=8192, num_hidden_layers=4, intermediate_size=28672)
    seen = []
    monkeypatch.setattr(torch.nn.init, "normal_", lambda t, *a, **k: seen.append(t) or t)
    counts = count_parameters(huge)
    assert counts.total > 2e9
    assert all(t.is_meta for t in seen)


def test_what_has_no_configuration_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="pass a local directory"):
        plan(tmp_path, speed=SPEED)
