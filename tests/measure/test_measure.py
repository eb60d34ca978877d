import json

import pytest

from pliant.measure import Reference, measure, speed
from tests.observe.test_text import Bytes

KEYS = {
    "kl", "kl_ci95", "perplexity", "perplexity_original", "top1", "weight_bytes", "tokens",
    "prefill_tps", "decode_tps",
}  # fmt: skip


def test_measure_gives_every_key_as_json(llama, other):
    seen = []
    text = "".join(chr(32 + i * i % 60) for i in range(200))
    found = measure(other, llama, text, Bytes(), window=32, progress=lambda *at: seen.append(at))
    assert set(json.loads(json.dumps(found))) >= KEYS
    assert found["tokens"] == 6 * 15
    assert found["kl"] > 0
    assert found["prefill_tps"] > 0
    assert found["decode_tps"] > 0
    assert seen == [(i, 12) for i in range(1, 13)]


def test_measure_takes_a_reference_that_was_made_before(llama, other, ids):
    reference = Reference.of(llama, ids)
    found = measure(other, reference, "", timed=False)
    assert found["kl"] == reference.damage(other).kl
    assert found["prefill_tps"] is None


def test_speed_counts_tokens_not_calls(llama):
    slow = speed(llama, prompt_tokens=64, new_tokens=4, repeats=2)
    assert slow.prefill_tps > slow.decode_tps  # many tokens a call


@pytest.mark.real
def test_smollm2_measured_against_half_precision():
    """bfloat16 damages a little, and perplexity on English text is that of a language model."""
    import torch

    from pliant.model import open_checkpoint

    checkpoint = open_checkpoint("smollm2")
    from transformers import AutoModelForCausalLM

    original = AutoModelForCausalLM.from_pretrained(checkpoint.directory, dtype=torch.float32)
    rounded = AutoModelForCausalLM.from_pretrained(checkpoint.directory, dtype=torch.float32)
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.bfloat16().float())
    text = "The river runs from the mountains to the sea, past villages and old mills. " * 8
    found = measure(rounded, original, text, checkpoint.tokenizer(), window=64, timed=False)
    assert 0 < found["kl"] < 0.01
    assert found["top1"] > 0.9
    assert 1 < found["perplexity_original"] < 60
