import math

import numpy as np
import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
)

from pliant.errors import PliantError
from pliant.measure import Reference
from pliant.measure.damage import bootstrap_ci95, scored_positions
from pliant.measure.logits import CHUNK_BYTES, call, rows_per_chunk, take_apart
from tests.measure.conftest import tiny_llama


@pytest.mark.parametrize("score", ["half", "all"])
def test_a_model_is_at_no_distance_from_itself(llama, ids, score):
    found = Reference.of(llama, ids, score).damage(llama)
    assert found.kl == 0.0
    assert found.kl_ci95 == (0.0, 0.0)
    assert found.top1 == 1.0
    assert found.perplexity == found.perplexity_original


def test_a_copy_of_a_model_is_at_no_distance(llama, ids):
    assert Reference.of(llama, ids).damage(tiny_llama()).kl == 0.0


def test_constructed_distributions_have_the_kl_that_algebra_gives():
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])

    def constant(distribution):
        return lambda ids: distribution.log().expand(*ids.shape, 3) + 7.0  # logits are shift-free

    ids = torch.tensor([[0, 1, 2, 0, 1, 2, 0, 1]])
    found = Reference.of(constant(p), ids, "all").damage(constant(q))
    assert found.kl == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-6)
    targets = ids[0, 1:]
    assert found.perplexity_original == pytest.approx(float((-p[targets].log()).mean().exp()))
    assert found.perplexity == pytest.approx(float((-q[targets].log()).mean().exp()))
    assert found.top1 == 0.0
    assert found.tokens == 7


def test_perplexity_is_that_of_the_models_own_loss(llama, other, ids):
    found = Reference.of(llama, ids, "all").damage(other)
    with torch.inference_mode():
        loss = [float(m(input_ids=ids, labels=ids).loss) for m in (llama, other)]
    assert found.perplexity_original == pytest.approx(math.exp(loss[0]), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(loss[1]), rel=1e-5)


def test_half_scores_what_llama_perplexity_scores(llama, other, ids):
    assert scored_positions(512, "half") == slice(256, 511)
    assert scored_positions(512, "all") == slice(0, 511)
    found = Reference.of(llama, ids, "half").damage(other)
    assert found.tokens == 6 * 15
    with torch.inference_mode():
        logits = other(ids).logits[:, 16:31].float().log_softmax(-1)
    nll = -logits.gather(-1, ids[:, 17:32, None]).mean()
    assert found.perplexity == pytest.approx(float(nll.exp()), rel=1e-5)


def test_kl_is_the_mean_over_windows_and_matches_the_whole_matrix(llama, other, ids):
    found = Reference.of(llama, ids).damage(other)
    with torch.inference_mode():
        p, q = (m(ids).logits[:, 16:31].double().log_softmax(-1) for m in (llama, other))
    exact = (p.exp() * (p - q)).sum(-1)
    assert found.kl == pytest.approx(float(exact.mean()), rel=1e-4)
    assert found.window_kl == pytest.approx(exact.mean(1).tolist(), rel=1e-4)
    assert found.kl_ci95[0] <= found.kl <= found.kl_ci95[1]


def test_limit_measures_the_first_windows_only(llama, other, ids):
    reference = Reference.of(llama, ids)
    few = reference.damage(other, limit=2)
    assert few.tokens == 30
    assert few.window_kl == reference.damage(other).window_kl[:2]


def test_the_interval_shrinks_with_the_square_root_of_the_windows():
    values = np.random.default_rng(0).normal(1.0, 0.5, 6400)
    few, many = bootstrap_ci95(values[:100]), bootstrap_ci95(values)
    assert (few[1] - few[0]) / (many[1] - many[0]) == pytest.approx(8, rel=0.25)
    assert bootstrap_ci95(values) == many  # seeded
    assert many[1] - many[0] == pytest.approx(2 * 1.96 * 0.5 / 80, rel=0.15)


SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.mark.parametrize(
    "build",
    [
        lambda: GPT2LMHeadModel(
            GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64)
        ),
        lambda: Gemma2ForCausalLM(Gemma2Config(head_dim=8, final_logit_softcapping=2.0, **SMALL)),
        lambda: CohereForCausalLM(CohereConfig(logit_scale=0.25, **SMALL)),
        lambda: GraniteForCausalLM(GraniteConfig(logits_scaling=4.0, **SMALL)),
    ],
    ids=["gpt2", "softcap", "logit_scale", "logits_scaling"],
)
def test_heads_that_bend_logits_are_taken_apart_exactly(build, ids):
    torch.manual_seed(0)
    model = build().eval()
    with torch.inference_mode():
        parts = take_apart(model, ids[:1])
        assert parts is not None
        torch.testing.assert_close(parts.head(parts.hidden(ids)), call(model, ids))


def test_a_model_that_cannot_be_taken_apart_is_called_whole(llama, other, ids):
    class Louder(torch.nn.Module):
        """Adds to the logits what no head knows of."""

        def __init__(self, inner):
            super().__init__()
            self.inner, self.model, self.base_model_prefix = inner, inner.model, "model"
            self.config = inner.config

        def get_output_embeddings(self):
            return self.inner.lm_head

        def forward(self, input_ids):
            return self.inner(input_ids).logits * 1.5

    louder = Louder(llama)
    assert take_apart(louder, ids[:1]) is None
    reference = Reference.of(louder, ids)
    assert reference.hidden is None
    assert reference.damage(louder).kl == 0.0
    assert reference.damage(other).kl > 0.0


def test_chunks_stay_within_their_bound():
    assert rows_per_chunk(49152) * 49152 * 4 <= CHUNK_BYTES
    assert rows_per_chunk(10**9) == 1


def test_a_key_keeps_the_originals_side_for_the_next_time(llama, other, ids, monkeypatch):
    first = Reference.of(llama, ids, key="abc")
    runs = []
    whole = llama.model.forward
    monkeypatch.setattr(
        llama.model, "forward", lambda *a, **k: runs.append(k["input_ids"].shape) or whole(*a, **k)
    )
    again = Reference.of(llama, ids, key="abc")
    assert all(shape[1] < ids.shape[1] for shape in runs)  # only the probe
    assert torch.equal(first.hidden, again.hidden)
    assert again.damage(llama).kl == 0.0
    Reference.of(llama, ids, "all", key="abc")  # other positions are another file
    assert any(shape[1] == ids.shape[1] for shape in runs)


def test_progress_is_told_of_every_window(llama, ids):
    seen = []
    reference = Reference.of(llama, ids, progress=lambda *at: seen.append(at))
    reference.damage(llama, progress=lambda *at: seen.append(at))
    assert seen == [(i, 6) for i in range(1, 7)] * 2


def test_other_vocabularies_and_scores_are_refused(llama, ids):
    reference = Reference.of(llama, ids)
    with pytest.raises(PliantError, match="vocabularies differ: 97 and 101"):
        reference.damage(tiny_llama(vocab_size=101))
    with pytest.raises(PliantError, match="'half' or 'all'"):
        Reference.of(llama, ids, "most")
    with pytest.raises(PliantError, match="none to score"):
        Reference.of(llama, ids[:, :1])
