"""Policies that evict, merge or cap distances: what each keeps, on cases that are easy to see."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from pliant.cache.limited import LimitedModel, attention
from pliant.cache.policies.chelsea import Chelsea
from pliant.cache.policies.citrus import CItruS
from pliant.cache.policies.distinct import Distinct, ranks
from pliant.cache.policies.elastic import Elastic, nearest
from pliant.cache.policies.ems import EMS
from pliant.cache.policies.h2o import H2O
from pliant.cache.policies.keep import Keep
from pliant.cache.policies.lm_infinite import LMInfinite
from pliant.cache.policies.merging import Merging
from pliant.cache.policies.raas import RaaS
from pliant.cache.policies.rkv import RKV
from pliant.cache.policies.zeromerge import ZeroMerge
from pliant.cache.policy import Entries, Layer
from pliant.cache.rotary import Rotary
from pliant.errors import PliantError

from .paging import llama, random_ids

HEADS, DIM = 2, 8
ALL = [H2O, RaaS, RKV, EMS, CItruS, ZeroMerge, Chelsea, Elastic, LMInfinite, Distinct]
ROTARY = Rotary(10000.0 ** -(torch.arange(DIM // 2) / (DIM // 2)))
LAYER = Layer(0, 1, 2 * HEADS, HEADS, DIM, DIM, ROTARY, DIM**-0.5)


def feed(policy, keys, values=None, queries=None, chunk: int = 10_000) -> list[torch.Tensor]:
    """`keys` and `values` [n, dim], the same for all heads; what each chunk of queries found."""
    values = torch.randn(len(keys), DIM) if values is None else values
    queries = torch.randn(2 * HEADS, len(keys), DIM) if queries is None else queries
    found, start = [], len(policy.kept) if policy.kept is not None else 0
    for at in range(0, len(keys), chunk):
        part, places = slice(at, at + chunk), torch.arange(start + at, start + len(keys))[:chunk]
        mine = queries[:, part]
        policy.add(
            Entries(
                keys[part].expand(HEADS, -1, -1),
                values[part].expand(HEADS, -1, -1),
                places.expand(HEADS, -1),
            ),
            mine,
        )
        output, weights = attention(mine, policy.read(mine), places, LAYER.scale)
        if policy.observes:
            policy.observe(weights)
        policy.settle()
        found.append(output)
    return found


def watched(count: int, hitters: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys [count, dim] and queries of which every one looks at `hitters`."""
    torch.manual_seed(1)
    keys = torch.randn(count, DIM)
    keys[:, 0] = 0
    keys[hitters, 0] = 6
    queries = 0.1 * torch.randn(2 * HEADS, count, DIM)
    queries[..., 0] = 4
    return keys, queries


def places(policy) -> set[int]:
    """What every head keeps."""
    return set.intersection(*map(set, policy.entries.positions.tolist()))


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("chunks", [[64, 40, 1, 1, 1, 43], [150], [1] * 60 + [90]])
def test_bytes_stay_bounded_whatever_the_chunks(make, chunks):
    model, (ids,), tokens = llama(), random_ids(150), 40
    options = {} if make is LMInfinite else {"recent": 10}
    limited = LimitedModel(model, partial(make, tokens=tokens, **options))
    numbers = 2 * 2 * tokens * (24 + 24)  # layers, kv heads
    beside = 2 * 2 * tokens * 4 * 4 + 2 * 4 * 16 * 24 * 2  # position, three marks; queries
    start = 0
    for size in chunks:
        assert torch.isfinite(limited(ids[start : start + size])).all()
        start += size
        assert limited.nbytes <= 2 * numbers + beside
        assert all(len(kept.entries) <= tokens for kept in limited.policies)
    assert all(len(kept.entries) == tokens for kept in limited.policies)


@pytest.mark.parametrize("make", ALL)
def test_a_budget_larger_than_the_text_is_keeping_all_bit_for_bit(make):
    model, (ids,) = llama(), random_ids(60)
    plain, small = LimitedModel(model, Keep), LimitedModel(model, partial(make, tokens=61))
    for start in range(0, 60, 20):
        part = ids[start : start + 20]
        assert torch.equal(small(part), plain(part))


@pytest.mark.parametrize("make", [H2O, RaaS, RKV, EMS, CItruS, ZeroMerge, Elastic, Distinct])
@pytest.mark.parametrize("chunk", [1, 16, 100])
def test_tokens_that_queries_look_at_outlive_others(make, chunk):
    hitters = [20, 21, 33, 47]
    keys, queries = watched(100, hitters)
    options = {RKV: {"share": 0.9, "pool": 1}, Distinct: {"share": 0.9}}.get(make, {})
    policy = make(LAYER, tokens=24, recent=8, sinks=2, **options)
    feed(policy, keys, queries=queries, chunk=chunk)
    stays = places(policy)
    if make is Elastic and chunk == 1:  # it writes: what is at a distance goes, whatever it is
        assert not stays & set(hitters)
    else:
        assert set(hitters) <= stays
    assert {0, 1} <= stays
    recent = range(92, 100) if not (make is Elastic and chunk == 1) else range(90, 100)
    assert set(recent) <= stays


def test_h2o_is_half_recent_tokens():
    policy = H2O(LAYER, tokens=20)
    feed(policy, torch.randn(60, DIM))
    assert policy.recent == 10
    assert set(range(50, 60)) <= set(policy.entries.positions[0].tolist())


def test_raas_lets_go_of_what_is_no_longer_used():
    keys, queries = watched(90, [10])
    queries[:, 60:, 0] = 0  # from then on nobody looks at 10
    kept = {}
    for make in (RaaS, H2O):
        policy = make(LAYER, tokens=24, recent=4, sinks=0)
        feed(policy, keys, queries=queries, chunk=1)
        kept[make] = 10 in policy.entries.positions[0].tolist()
    assert kept == {RaaS: False, H2O: True}


def test_rkv_keeps_one_of_what_repeats_itself_and_that_is_the_newest():
    torch.manual_seed(0)
    keys = torch.nn.functional.normalize(torch.randn(40, DIM), dim=-1)
    copies = list(range(5, 25))
    keys[copies] = keys[5] + 0.001 * torch.randn(20, DIM)
    policy = RKV(LAYER, tokens=21, recent=2, sinks=1, alike=0.95)
    feed(policy, keys, queries=torch.zeros(2 * HEADS, 40, DIM))
    stays = sorted(places(policy) & set(copies))
    assert stays == [24]  # 20 others and the newest copy


def test_distinct_keeps_the_rare_key_wherever_the_common_one_stands():
    """Where positions are on, copies of one key are not alike."""
    torch.manual_seed(0)
    common, rare = torch.randn(DIM), [17, 40]
    plain = common + 0.1 * torch.randn(80, DIM)
    plain[rare] = torch.randn(2, DIM)
    keys = ROTARY.turn(plain, torch.arange(80))
    policy = Distinct(LAYER, tokens=14, recent=8, sinks=2)
    feed(policy, keys, queries=torch.zeros(2 * HEADS, 80, DIM), chunk=20)
    assert set(rare) <= places(policy)
    is_rare = torch.isin(policy.entries.positions, torch.tensor(rare))
    assert ranks(policy.distinctness())[is_rare].amin() >= 12


def test_citrus_keeps_what_the_instruction_asks_for():
    torch.manual_seed(0)
    keys = torch.randn(80, DIM)
    keys[:, -1] = 0  # the last pair of a head turns slowest: positions hardly change it
    keys[30, -1] = 9
    queries = torch.randn(2 * HEADS, 80, DIM)
    queries[:, 4:, -1] = -9
    queries[:, :4, -1] = 9  # the four tokens of the instruction look for it
    policy = CItruS(LAYER, tokens=20, recent=6, sinks=0, instruction=4)
    plain = CItruS(LAYER, tokens=20, recent=6, sinks=0, window=4)
    for each in (policy, plain):
        feed(each, keys, queries=queries, chunk=10)
    assert all(30 in own and {0, 1, 2, 3} <= set(own) for own in policy.entries.positions.tolist())
    assert not all(30 in own for own in plain.entries.positions.tolist())
    assert policy.nbytes > 2 * HEADS * 20 * 2 * DIM + 2 * HEADS * 4 * DIM * 2  # queries are held


class Twins(Merging):
    """Merges every odd entry into the one before."""

    def importance(self):
        raise NotImplementedError

    def settle(self):
        count = len(self.entries)
        chosen = torch.arange(0, count, 2).expand(HEADS, -1).contiguous()
        self.merge(chosen, (torch.arange(count) // 2).expand(HEADS, -1))


def test_merging_equal_keys_leaves_attention_as_it_was():
    torch.manual_seed(0)
    keys = torch.randn(8, DIM).bfloat16().float().repeat_interleave(2, 0)
    values = torch.randn(16, DIM).bfloat16().float()
    queries = torch.randn(2 * HEADS, 1, DIM)
    policy = Twins(LAYER, tokens=64)
    feed(policy, keys, values)
    after, _ = attention(queries, policy.read(queries), torch.tensor([16]), LAYER.scale)
    shape = (HEADS, -1, -1)
    whole = Entries(keys.expand(*shape), values.expand(*shape), torch.arange(16).expand(HEADS, -1))
    before, _ = attention(queries, whole, torch.tensor([16]), LAYER.scale)
    torch.testing.assert_close(after, before, atol=0.02, rtol=0.02)  # bfloat16 means
    assert policy.mark("merged").tolist() == [[1.0] * 8] * HEADS


@pytest.mark.parametrize("make", [ZeroMerge, Chelsea])
@pytest.mark.parametrize("chunk", [1, 12, 64])
def test_merged_entries_keep_the_mean_and_count_of_all_tokens(make, chunk):
    values = torch.randn(64, DIM)
    policy = make(LAYER, tokens=24, recent=6, sinks=2)
    feed(policy, torch.randn(64, DIM), values, chunk=chunk)
    counts = policy.mark("merged") + 1
    assert (counts.sum(1) == 64).all()
    mean = (policy.entries.values.float() * counts[..., None]).sum(1) / 64
    torch.testing.assert_close(mean, values.mean(0).expand(HEADS, -1), atol=0.02, rtol=0.02)
    assert (counts[:, :2] == 1).all()
    assert (counts[:, -6:] == 1).all()


def test_zeromerge_has_so_many_residuals():
    policy = ZeroMerge(LAYER, tokens=40, residuals=0.1)
    feed(policy, torch.randn(120, DIM), chunk=30)
    assert (policy.mark("residual").sum(1) == 4).all()
    assert ((policy.mark("merged") > 0) <= (policy.mark("residual") > 0)).all()


def test_chelsea_merges_the_pairs_most_alike():
    torch.manual_seed(0)
    keys = torch.randn(20, DIM)
    keys[8], keys[14] = keys[9], keys[15]
    policy = Chelsea(LAYER, tokens=18, recent=2, sinks=2, chunk=4)
    feed(policy, keys)
    assert places(policy) == set(range(20)) - {8, 14}
    assert policy.mark("merged")[0].nonzero()[:, 0].tolist() == [8, 13]


def test_ems_merges_what_is_alike_and_drops_what_is_not():
    keys, queries = watched(30, [4, 10])
    keys[10:14] = keys[10]  # four that are alike; the budget is too small for all
    policy = EMS(LAYER, tokens=8, recent=4, sinks=1, merges=1.0, alike=0.95)
    feed(policy, keys, queries=queries)
    merged = policy.mark("merged")[0]
    stays = policy.entries.positions[0].tolist()
    assert merged.sum() >= 1
    assert all(place in (10, 11, 12, 13) for place, n in zip(stays, merged, strict=True) if n)


def test_elastic_merges_into_the_nearest_anchor():
    chosen = torch.tensor([[0, 4, 9]])
    assert nearest(chosen, torch.arange(12)[None])[0].tolist() == [0] * 2 + [1] * 5 + [2] * 5


@pytest.mark.parametrize("chunk", [1, 16, 32])
def test_lm_infinite_never_exceeds_its_distance(chunk):
    """With keys that are all the same, only the distance is left in the score."""
    keys = torch.randn(1, DIM).expand(200, -1)
    turned = ROTARY.turn(keys, torch.arange(200))
    policy = LMInfinite(LAYER, tokens=60, sinks=8, distance=40)
    feed(policy, turned, chunk=chunk)
    last = torch.full((1,), 200)
    policy.add(
        Entries(
            ROTARY.turn(keys[:1], last).expand(HEADS, -1, -1),
            keys[:1].expand(HEADS, -1, -1),
            last.expand(HEADS, -1),
        ),
        torch.zeros(2 * HEADS, 1, DIM),
    )
    seen = policy.read(torch.zeros(2 * HEADS, 1, DIM))
    assert set(policy.entries.positions[0].tolist()) == {*range(8), *range(148, 201)}
    distances = (200 - policy.entries.positions).clamp_max(40)
    expected = ROTARY.turn(keys[:1].expand(HEADS, 61, -1), 200 - distances)
    torch.testing.assert_close(seen.keys, expected, atol=0.03, rtol=0.03)


def test_mistakes_are_refused():
    with pytest.raises(PliantError, match="shorter chunks"):
        feed(LMInfinite(LAYER, tokens=40, distance=20), torch.randn(30, DIM))
    with pytest.raises(PliantError, match="no rotary embedding"):
        LMInfinite(Layer(0, 1, 4, 2, DIM, DIM, None, 1.0), tokens=40)
    with pytest.raises(PliantError, match="even number"):
        Chelsea(LAYER, chunk=3)
    with pytest.raises(PliantError, match="share from 0 to 1"):
        RKV(LAYER, share=2)


@pytest.mark.parametrize("make", [H2O, RKV, RaaS, Distinct])
def test_scores_do_not_depend_on_how_the_text_is_cut(make):
    keys, queries = torch.randn(40, DIM), torch.randn(2 * HEADS, 40, DIM)
    values = torch.randn(40, DIM)
    scores = []
    for chunk in (1, 7, 40):
        policy = make(LAYER, tokens=80)
        feed(policy, keys, values, queries, chunk)
        scores.append(policy.importance())
    torch.testing.assert_close(scores[1], scores[0])
    torch.testing.assert_close(scores[2], scores[0])
