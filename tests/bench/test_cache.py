"""The bench of KV policies: damage, the shared prompt, and how the peers' bytes are counted."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from pliant.cache.limited import LimitedModel
from pliant.cache.policies.h2o import H2O
from pliant.cache.policies.keep import Keep
from tests.cache.paging import llama, random_ids

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import cache as bench
import cache_peers
import cache_table
from cache_protocol import PROTOCOLS, Score


def test_the_original_has_no_damage_and_another_has():
    model, (ids,) = llama(), random_ids(24)
    hidden = model.model(torch.tensor([ids])).last_hidden_state[0].detach()
    own, other = Score(model.lm_head, hidden), Score(model.lm_head, hidden)
    for rows in hidden.split(10):
        own.add(model.lm_head(rows))
        other.add(model.lm_head(rows.flip(0)))
    assert own.result() == {"kl": 0.0, "same": 1.0}
    assert other.result()["kl"] > 0


@pytest.mark.parametrize("make", [Keep, partial(H2O, tokens=16, recent=4)])
def test_the_shared_prompt_is_the_prompt_read_at_once(monkeypatch, make):
    monkeypatch.setattr(bench, "PROMPT", 30)
    model, (ids,) = llama(), random_ids(40)
    one, other = LimitedModel(model, make), LimitedModel(model, make)
    one(ids[:30])
    bench.Prompt(model, torch.tensor(ids)).give(other)
    assert one.nbytes == other.nbytes
    assert bench.sixteen_bits(other) == 2 * 2 * 30 * 2 * 48
    # the prompt's later layers saw exact keys there and bfloat16 ones here
    torch.testing.assert_close(one(ids[30:]), other(ids[30:]), atol=0.03, rtol=0.03)


def test_floats_of_peers_count_two_bytes_and_integers_their_own():
    kept = {"codes": torch.zeros(6, dtype=torch.uint8), "pair": (torch.zeros(4), [torch.ones(1)])}
    assert cache_peers.tensor_bytes(kept) == 6 + 2 * 4 + 2


def test_a_report_has_every_row_and_marks_peers(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_table, "RESULTS", tmp_path / "cache")
    monkeypatch.setattr(cache_table, "PAGE", tmp_path / "cache.md")
    window = {"kl": 0.1, "same": 0.9, "bytes_prompt": 10, "bytes_end": 40, "read": 0.2,
              "seconds": 1.0}  # fmt: skip
    base = {"kind": "evict", "options": {"tokens": 3}}
    rows = {name: {
        "a": base | {"name": "keep", "windows": {"0": window | {"bytes_end": 80}}},
        "b": base | {"name": "small", "windows": {str(i): window for i in range(3)}},
        "c": base | {"name": "theirs", "windows": {"0": window}, "peer": True,
                     "versions": {"kvpress": "1"}},
        "d": base | {"name": "none", "windows": {}, "failed": "no room"},
    } for name in PROTOCOLS}  # fmt: skip
    told = {"command": "c", "date": "d", "machine": "m", "windows": 3}
    cache_table.write({"ids": "x", "reuse": {}, **rows}, told)
    page = (tmp_path / "cache.md").read_text()
    assert page.index("| small |") < page.index("| keep |") < page.index("| none |")
    assert "| *theirs* |" in page
    assert "no room" in page
    kept = json.loads((tmp_path / "cache.json").read_text())["rows"]["parts"]
    assert {row["name"]: row.get("share") for row in kept}["small"] == 0.5
    assert (tmp_path / "cache.png").stat().st_size > 0
