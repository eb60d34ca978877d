"""Reuse of keys and values: what changes nothing, and where keys end up."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from pliant.cache.limited import LimitedModel
from pliant.cache.policies.keep import Keep
from pliant.cache.policies.squeezed import Squeezed
from pliant.cache.reuse import Passage, assembled, edited, fill, read
from pliant.cache.rotary import Rotary
from pliant.errors import PliantError

from .paging import llama, random_ids
from .test_policy import through


def behind(model, passage: Passage, ids: list[int]) -> torch.Tensor:
    limited = LimitedModel(model, Keep)
    fill(limited, passage)
    return limited(ids)


def close(one: Passage, other: Passage, layers: int | None = None, tolerance: float = 0.03) -> None:
    """bfloat16 keys that were turned again differ by its rounding."""
    assert torch.equal(one.tokens, other.tokens)
    for a, b in list(zip(one.layers, other.layers, strict=True))[:layers]:
        assert torch.equal(a.positions, b.positions)
        torch.testing.assert_close(a.keys, b.keys, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(a.values, b.values, atol=tolerance, rtol=tolerance)


def test_a_text_of_one_passage_is_the_plain_text():
    model, (ids,) = llama(), random_ids(40)
    passage = assembled(model, [read(model, ids[:30])])
    expected, _ = through(model, Keep, ids, 30)
    torch.testing.assert_close(behind(model, passage, ids[30:]), expected[30:])


def test_a_passage_read_behind_another_is_the_text_read_at_once():
    model, (ids,) = llama(), random_ids(40)
    first = read(model, ids[:25])
    both = [first, read(model, ids[25:], first)]
    close(assembled(model, both), read(model, ids))


def test_moving_by_zero_is_the_same_and_moving_away_and_back_nearly():
    model, (ids,) = llama(), random_ids(20)
    rotary, passage = Rotary.of(model), read(llama(), ids)
    assert passage.at(0, rotary) is passage
    close(passage.at(300, rotary).at(0, rotary), passage)


def test_assembled_keys_are_those_computed_at_their_places():
    """Alone at another position, the first layer's keys are what the whole text has there."""
    model, (ids,) = llama(), random_ids(45)
    whole = read(model, ids)
    parts = [read(model, ids[start : start + 15]) for start in (0, 15, 30)]
    found = assembled(model, parts)
    close(found, whole, layers=1)
    assert found.layers[1].positions[0].tolist() == list(range(45))
    # later layers saw their own passage alone: the same wherever it stands
    again = assembled(model, [parts[1], parts[0]])
    close(again.part(15, 30).at(0, Rotary.of(model)), parts[0])
    assert not torch.allclose(found.layers[1].values, whole.layers[1].values, atol=0.05)


def test_an_edit_that_changes_nothing_changes_nothing():
    model, (ids,) = llama(), random_ids(30)
    passage = read(model, ids)
    assert edited(model, passage, 10, 14, ids[10:14]) is passage
    assert edited(model, passage, 30, 30) is passage


def test_an_edit_at_the_end_is_exact():
    model, (ids, new) = llama(), random_ids(30, 5)
    passage = read(model, ids)
    close(edited(model, passage, 26, 30, new), read(model, ids[:26] + new))
    close(edited(model, passage, 30, 30, new), read(model, ids + new))
    close(edited(model, passage, 20, 30), read(model, ids[:20]))
    close(edited(model, passage, 0, 30, new), read(model, new))


@pytest.mark.parametrize(("start", "stop", "count"), [(8, 8, 5), (8, 14, 0), (8, 14, 5)])
def test_an_edit_computes_the_span_and_turns_what_follows(start, stop, count):
    model, (ids, new) = llama(), random_ids(30, count)
    known = read(model, ids)
    after = ids[:start] + new + ids[stop:]
    found = edited(model, known, start, stop, new)
    close(found, read(model, after), layers=1)  # the first layer depends on nothing before
    whole = read(model, after)
    size = start + count
    close(found.part(0, size), whole.part(0, size))
    for own, old in zip(found.layers, known.layers, strict=True):
        assert torch.equal(own.values[:, size:], old.values[:, stop:])
    assert behind(model, found, [1, 2]).isfinite().all()


def test_what_cannot_be_done_is_said():
    model, (ids,) = llama(), random_ids(20)
    passage = read(model, ids)
    with pytest.raises(PliantError, match="no span from 5 to 30"):
        edited(model, passage, 5, 30)
    with pytest.raises(PliantError, match="put passages together first"):
        fill(LimitedModel(model, Keep), passage.part(5, 20))
    with pytest.raises(PliantError, match="policy keep alone"):
        fill(LimitedModel(model, partial(Squeezed, share=0.5)), passage)
