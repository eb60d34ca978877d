"""Policies that choose what to attend to: all chosen is full attention, and what a choice reads."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from pliant.cache.limited import LimitedModel
from pliant.cache.policies.keep import Keep
from pliant.cache.policies.louiskv import LouisKV
from pliant.cache.policies.retrieving import clusters, picked, within
from pliant.cache.policies.squeezed import Squeezed
from pliant.cache.policy import Entries, Layer
from pliant.errors import PliantError

from .paging import llama, random_ids
from .test_policy import through

SMALL = {
    Squeezed: {"cluster": 4, "block": 16, "recent": 4},
    LouisKV: {"cluster": 4, "segment": 8, "output": 2, "recent": 4},
}


def layer(heads: int = 2, kv_heads: int = 1, dim: int = 8) -> Layer:
    return Layer(0, 1, heads, kv_heads, dim, dim, None, 1.0)


def entries(keys: torch.Tensor, start: int = 0) -> Entries:
    positions = torch.arange(start, start + keys.shape[1]).expand(len(keys), -1)
    return Entries(keys, torch.randn_like(keys), positions)


@pytest.mark.parametrize("kind", [Squeezed, LouisKV])
@pytest.mark.parametrize("chunk", [1, 24])
def test_all_units_chosen_is_full_attention(kind, chunk):
    model, (ids,) = llama(), random_ids(72)
    found, limited = through(model, partial(kind, share=1.0, **SMALL[kind]), ids, chunk)
    expected, _ = through(model, Keep, ids, chunk)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert all(policy.grouped > 0 for policy in limited.policies) or chunk == 1


@pytest.mark.parametrize("kind", [Squeezed, LouisKV])
def test_everything_is_kept_and_a_choice_reads_its_share(kind):
    model, (ids,) = llama(), random_ids(120)
    limited = LimitedModel(model, partial(kind, share=0.25, **SMALL[kind]))
    limited(ids[:112])
    limited(ids[112:113])
    for policy in limited.policies:
        assert len(policy.entries) == 113
        row = (24 + 24) * 2
        extra = policy.nbytes - 2 * 113 * row
        assert 0 < extra < 0.5 * policy.nbytes  # centroids and labels
        loose = 113 - (policy.grouped if kind is Squeezed else 108)
        centroids = policy.centroids.nbytes
        most = 2 * (0.25 * 112 + loose) * row + centroids
        assert centroids < policy.read_bytes <= most
        assert policy.read_bytes < policy.nbytes


def test_the_cluster_that_a_query_looks_at_is_chosen_and_others_are_not():
    torch.manual_seed(0)
    axes = 6 * torch.eye(8)[:4]
    keys = axes.repeat_interleave(16, 0)[None] + 0.01 * torch.randn(1, 64, 8)
    policy = Squeezed(layer(), share=0.25, cluster=16, block=16, recent=0)
    policy.add(entries(keys), torch.randn(2, 64, 8))
    policy.settle()
    query = axes[2].expand(2, 1, 8)
    seen = policy.read(query)
    assert seen.positions[0].tolist() == list(range(32, 48))


def test_one_threshold_serves_all_heads_and_short_rows_are_filled_up_out_of_sight():
    torch.manual_seed(0)
    axes = 6 * torch.eye(8)[:4]
    keys = axes.repeat_interleave(16, 0)[None].repeat(2, 1, 1) + 0.01 * torch.randn(2, 64, 8)
    policy = Squeezed(layer(2, 2), share=0.375, cluster=16, block=16, recent=0)
    policy.add(entries(keys), torch.randn(2, 64, 8))
    policy.settle()
    sharp, even = axes[1], 0.1 * (axes[0] + axes[3])  # one place, and two alike
    seen = policy.read(torch.stack([sharp, even])[:, None])
    visible = seen.positions < 64
    assert visible.sum(1).tolist() == [16, 32]
    assert seen.positions[0][visible[0]].tolist() == list(range(16, 32))


def test_alike_queries_fetch_once_and_others_fetch_again():
    torch.manual_seed(0)
    policy = LouisKV(layer(), share=0.3, cluster=4, recent=4, output=1)
    policy.add(entries(torch.randn(1, 64, 8)), torch.randn(2, 64, 8))
    policy.read(torch.randn(2, 64, 8))
    policy.settle()
    query, fetched = torch.randn(2, 1, 8), []
    for step, now in enumerate((query, 1.1 * query, query + 0.01, -query)):
        policy.add(entries(torch.randn(1, 1, 8), 64 + step), now)
        policy.read(now)
        policy.settle()
        fetched.append(policy.fetched)
    assert 0 < fetched[0] == fetched[1] == fetched[2] < fetched[3]
    assert policy.sizes[0, -1] == 3  # the segment that the turn closed
    assert policy.sizes.sum() == 64 + 4 - 1  # all but the newest token
    assert policy.sizes.shape[1] == 1 + 56 // 4 + 2  # sinks, clusters, rest of the input, segment


def test_clusters_are_of_one_direction_and_picking_keeps_the_order():
    keys = torch.eye(4).repeat_interleave(5, 0)[None]
    labels = clusters(keys * torch.rand(1, 20, 1).add(0.5), 4)
    assert torch.equal(labels, torch.arange(4).repeat_interleave(5)[None])
    mask = torch.tensor([[True, False, True, True], [False, True, False, False]])
    taken = picked(entries(torch.randn(2, 4, 8)), mask)
    assert taken.positions[0].tolist() == [0, 2, 3]
    assert taken.positions[1, 0] == 1
    assert taken.positions[1, 1:].min() > 10**6
    worth = torch.tensor([[0.1, 0.9, 0.5]])
    sizes = torch.tensor([[4, 5, 3]])
    assert within(worth, sizes, 8).tolist() == [[False, True, True]]
    assert within(worth, sizes, 1).tolist() == [[False, True, False]]


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(PliantError, match="share"):
        Squeezed(layer(), share=share)
