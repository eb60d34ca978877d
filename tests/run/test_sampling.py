"""Filters leave the tokens that they should, in any combination; scores are log probabilities."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pliant.errors import PliantError
from pliant.run.sampling import Sampler, Score

LOGITS = torch.tensor([0.0, 3.0, 2.0, -1.0, 1.0])


def drawn(count: int = 300, **options) -> set[int]:
    sampler = Sampler(temperature=1.0, seed=0, **options)
    generator = sampler.generator()
    return {sampler.choose(LOGITS, generator) for _ in range(count)}


def test_top_k_leaves_the_likeliest():
    assert drawn(top_k=1) == {1}
    assert drawn(top_k=2) == {1, 2}
    assert drawn(top_k=0) == drawn(top_k=99) == {0, 1, 2, 3, 4}


def test_top_k_cuts_ties():
    sampler = Sampler(temperature=1.0, seed=0, top_k=2)
    generator = sampler.generator()
    assert len({sampler.choose(torch.zeros(9), generator) for _ in range(200)}) == 2


def test_min_p_leaves_what_is_likely_beside_the_likeliest():
    assert drawn(min_p=1.0) == {1}
    assert drawn(min_p=math.exp(-1.5)) == {1, 2}
    assert drawn(min_p=math.exp(-2.5)) == {1, 2, 4}
    hot = Sampler(temperature=2.0, seed=0, min_p=math.exp(-1.25))
    generator = hot.generator()
    assert {hot.choose(LOGITS, generator) for _ in range(300)} == {1, 2, 4}


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(-30, 30), min_size=1, max_size=12),
    st.floats(1e-300, 10),
    st.integers(0, 15),
    st.floats(0.01, 1),
    st.floats(0, 1),
    st.integers(0, 9),
)
def test_some_token_always_passes_every_filter(values, temperature, top_k, top_p, min_p, seed):
    logits = torch.tensor(values)
    values = logits.tolist()
    sampler = Sampler(temperature, top_p, seed, top_k, min_p)
    token = sampler.choose(logits, sampler.generator())
    better = int((logits > logits[token]).sum())
    assert better < (top_k or len(values))
    gap = (float(logits.max()) - values[token]) / temperature
    assert min_p == 0 or gap <= -math.log(min_p) + 1e-3
    assert sampler.choose(logits, sampler.generator()) == token


@pytest.mark.parametrize(
    "options", [{"top_k": -1}, {"min_p": 1.5}, {"min_p": -0.1}, {"temperature": math.nan}]
)
def test_impossible_settings_are_refused(options):
    with pytest.raises(PliantError, match=next(iter(options))):
        Sampler(**options)


def test_a_score_is_the_models_own_log_probability():
    expected = torch.log_softmax(LOGITS, dim=-1)
    score = Score.of(LOGITS, 3, 2)
    assert score.token == 3
    assert score.logprob == pytest.approx(float(expected[3]))
    assert [token for token, _ in score.likeliest] == [1, 2]
    assert score.likeliest[0][1] == pytest.approx(float(expected[1]))
    assert len(Score.of(LOGITS, 3, 99).likeliest) == 5
    assert Score.of(LOGITS.bfloat16(), 3, 0).likeliest == ()
