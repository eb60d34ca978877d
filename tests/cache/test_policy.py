"""Policies: the one that keeps all changes nothing, and what evicting ones keep adds up."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from pliant.cache.limited import LimitedModel
from pliant.cache.policies.evicting import Evicting
from pliant.cache.policies.keep import Keep
from pliant.cache.policy import find_policy, policies
from pliant.cache.rotary import Rotary
from pliant.errors import PliantError

from .paging import alone, llama, random_ids


def through(model, make, ids: list[int], chunk: int) -> tuple[torch.Tensor, LimitedModel]:
    limited = LimitedModel(model, make)
    parts = [limited(ids[start : start + chunk]) for start in range(0, len(ids), chunk)]
    return torch.cat(parts), limited


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_keeping_all_is_the_dense_cache(chunk):
    model, (ids,) = llama(), random_ids(50)
    found, limited = through(model, Keep, ids, chunk)
    expected = alone(model, ids, [len(ids)], torch.bfloat16)
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)
    assert limited.nbytes == 2 * 50 * 2 * (24 + 24) * 2  # layers, tokens, kv heads, dims, bytes


class Newest(Evicting):
    """The newest tokens, and how often each was asked for its mark."""

    def importance(self):
        self.mark("turns").add_(1)
        return self.entries.positions.float()


def test_an_evicting_policy_keeps_sinks_and_recent_tokens_and_its_marks_go_with_them():
    model, (ids,) = llama(), random_ids(60)
    _, limited = through(model, partial(Newest, tokens=20, recent=8, sinks=3), ids, 10)
    for kept in limited.policies:
        expected = torch.tensor([0, 1, 2, *range(43, 60)]).expand(2, -1)
        assert torch.equal(kept.entries.positions, expected)
        assert kept.mark("turns")[0].tolist() == [4, 4, 4, *[2] * 7, *[1] * 10]
        numbers = 2 * 20 * (24 + 24)
        assert kept.nbytes == 2 * numbers + 2 * 20 * 4 * 2  # positions and the mark


def test_a_cache_too_small_for_what_must_stay_is_refused():
    with pytest.raises(PliantError, match="give more tokens"):
        LimitedModel(llama(), partial(Newest, tokens=12, recent=8, sinks=4))


def test_positions_come_off_and_go_on_again():
    rotary = Rotary.of(llama())
    states, positions = torch.randn(2, 9, 24), torch.arange(9) * 31
    plain = rotary.turn(states, positions, back=True)
    torch.testing.assert_close(rotary.turn(plain, positions), states)
    moved = rotary.shift(states, torch.full((9,), 5))
    torch.testing.assert_close(moved, rotary.turn(plain, positions + 5), atol=1e-4, rtol=1e-4)


def test_the_catalog_names_its_policies():
    assert "keep" in policies()
    with pytest.raises(PliantError, match=r"known: .*keep"):
        find_policy("nothing")
