"""Filters leave the tokens that they should, in any combination; scores are log probabilities."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import entr, softmax

from pliant.errors import PliantError
from pliant.run.sampling import Sampler, Score, bounded, entropy, likeliest

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


def falling(values: list[float]) -> np.ndarray:
    """Probabilities of logits, the likeliest first."""
    return np.sort(softmax(np.array(values, dtype=np.float64)))[::-1]


def nats(probabilities: np.ndarray) -> float:
    """Entropy of `probabilities` brought to sum to one."""
    return float(entr(probabilities / probabilities.sum()).sum())


LISTS = st.lists(st.floats(-30, 30), min_size=1, max_size=40)


@settings(max_examples=200, deadline=None)
@given(LISTS, st.floats(0.01, 1))
def test_top_h_bounds_the_entropy_and_stops_at_the_first_token_too_many(values, share):
    ordered = falling(values)
    most = share * nats(ordered)
    kept = bounded(ordered, most)
    assert entropy(ordered) == pytest.approx(nats(ordered), abs=1e-9)
    assert 1 <= kept <= len(values)
    assert kept == 1 or nats(ordered[:kept]) <= most + 1e-9
    assert kept == len(values) or nats(ordered[: kept + 1]) > most - 1e-9


@settings(max_examples=100, deadline=None)
@given(LISTS, st.floats(0.01, 1), st.floats(0.01, 1))
def test_more_entropy_never_leaves_fewer_tokens(values, one, other):
    ordered = falling(values)
    all_of_them = nats(ordered)
    fewer, more = sorted((one * all_of_them, other * all_of_them))
    assert bounded(ordered, fewer) <= bounded(ordered, more)


def test_top_h_leaves_the_likeliest():
    ordered = falling(LOGITS.tolist())
    assert bounded(ordered, 0.75 * nats(ordered)) == 2
    assert drawn(top_h=0.75) == {1, 2}
    assert drawn(top_h=1e-9) == {1}
    assert drawn(top_h=1.0) == {0, 1, 2, 3, 4}
    assert drawn(top_h=0.75, top_k=1) == {1}


def test_a_token_that_cannot_be_drawn_has_no_entropy():
    logits = torch.tensor([0.0, 1.0, -math.inf, 0.5, -math.inf])
    sampler = Sampler(temperature=1.0, seed=0, top_h=0.999)
    generator = sampler.generator()
    assert {sampler.choose(logits, generator) for _ in range(100)} <= {0, 1, 3}


def test_penalties_count_the_answers_tokens():
    sampler, generator = Sampler(presence_penalty=0.5), torch.Generator()
    assert sampler.choose(LOGITS, generator) == 1
    assert sampler.choose(LOGITS, generator, {1: 3}) == 1
    assert sampler.choose(LOGITS, generator, {0: 1, 3: 9}) == 1
    often = Sampler(frequency_penalty=0.5)
    assert often.choose(LOGITS, generator, {1: 1}) == 1
    assert often.choose(LOGITS, generator, {1: 3}) == 2
    both = Sampler(presence_penalty=0.6, frequency_penalty=0.5)
    assert both.choose(LOGITS, generator, {1: 1}) == 2
    assert Sampler(frequency_penalty=-2).choose(LOGITS, generator, {4: 2}) == 4


def test_a_bias_is_added_to_logits():
    generator = torch.Generator()
    assert Sampler(logit_bias=((1, -100.0),)).choose(LOGITS, generator) == 2
    assert Sampler(logit_bias=((3, 4.5),)).choose(LOGITS.bfloat16(), generator) == 3
    both = Sampler(logit_bias=((3, 4.5),), presence_penalty=1.0)
    assert both.choose(LOGITS, generator, {3: 1}) == 1
    assert LOGITS.tolist() == [0.0, 3.0, 2.0, -1.0, 1.0]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.5]), min_size=1, max_size=30), st.integers(1, 31))
def test_the_likeliest_are_the_front_of_a_stable_sort(values, count):
    found = likeliest(np.array(values), count).tolist()
    order = sorted(range(len(values)), key=lambda i: -values[i])
    assert found == order[: len(found)]
    assert len(found) >= min(count, len(values))


def plainly(logits: torch.Tensor, sampler: Sampler, generator: torch.Generator) -> int:
    """The same choice with torch's own operations."""
    logits = logits.double()
    kept = torch.softmax((logits - logits.max()) / sampler.temperature, -1)
    ordered, order = kept.sort(descending=True, stable=True)
    mass = ordered.cumsum(0) - ordered
    ordered[sampler.top_k or len(ordered) :] = 0
    ordered[mass >= sampler.top_p] = 0
    kept = torch.zeros_like(kept).scatter(0, order, ordered)
    kept[kept < sampler.min_p * kept.max()] = 0
    return int(torch.multinomial(kept, 1, generator=generator))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float64])
def test_draws_are_those_of_torch(kind):
    rows = torch.randn(20, 49_152, generator=torch.Generator().manual_seed(0)).to(kind) * 4
    for i, row in enumerate(rows):
        top_k = [0, 50, 0, 5000][i // 2 % 4]  # beyond what is sorted at first, too
        sampler = Sampler(0.5 + i / 3, [1.0, 0.9][i % 2], i, top_k, i % 3 / 40)
        ours, theirs = sampler.generator(), sampler.generator()
        for _ in range(3):
            assert sampler.choose(row, ours) == plainly(row, sampler, theirs)


def test_logits_that_are_no_numbers_are_refused():
    sampler = Sampler(temperature=1.0, seed=0)
    for wrong in (math.nan, math.inf):
        with pytest.raises(PliantError, match="not numbers"):
            sampler.choose(torch.tensor([0.0, wrong]), sampler.generator())


def test_what_is_off_changes_nothing():
    """Not one bit: the logits are handed on as they are."""
    sampler = Sampler(temperature=1.0, seed=1)
    assert sampler._changed(LOGITS, {1: 5}) is LOGITS


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
    "options",
    [
        {"top_k": -1}, {"min_p": 1.5}, {"min_p": -0.1}, {"temperature": math.nan}, {"top_h": 0},
        {"top_h": 1.1}, {"presence_penalty": math.inf}, {"frequency_penalty": math.nan},
    ],
)  # fmt: skip
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
