"""The bench of methods: every method has a row, shards share them out, files merge."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pliant.fit.recipe import Reconstruct
from pliant.methods import catalog, find
from tests.conftest import TEXT
from tests.tiny import save_tiny

BENCH = Path(__file__).parents[2] / "bench"
sys.path.insert(0, str(BENCH))
import methods  # noqa: E402
from methods_rows import CURVE, OWN_TEXT, ROWS, Row  # noqa: E402
from methods_table import Known, gptq_at  # noqa: E402

EVERY = (*CURVE, *ROWS)
torch.set_num_threads(1)


def test_every_method_of_the_catalog_has_a_row_and_every_row_a_method() -> None:
    assert set(catalog()) == set().union(*(row.methods for row in EVERY))
    assert len({row.key for row in EVERY}) == len(EVERY)
    for row in EVERY:
        base = row.options.get("base", find(row.method).options.get("base"))
        known = {**find(row.method).options, **(find(base).options if base else {})}
        assert set(row.options) <= set(known), row.key
        assert row.select in ("", OWN_TEXT) or find(row.select).kind == "calibrate"


@pytest.mark.parametrize("count", [1, 3, 8])
def test_shards_share_out_all_rows(count: int) -> None:
    parts = [methods.wanted(shard=(i, count)) for i in range(count)]
    assert sorted(row.key for part in parts for row in part) == sorted(row.key for row in EVERY)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    kept = methods.wanted("littlebit,bct", (0, count))
    assert {row.method for row in kept} <= {"littlebit", "bct"}


@pytest.mark.parametrize("text", ["2", "2/2", "-1/2", "a/b"])
def test_a_shard_that_is_none(text: str) -> None:
    with pytest.raises(methods.argparse.ArgumentTypeError, match="I/N"):
        methods.parsed_shard(text)


def test_gptq_between_its_sizes() -> None:
    low, high = CURVE[2].key, CURVE[4].key
    rows = {low: {"bits": 2.0, "kl": 1.0}, high: {"bits": 3.0, "kl": 0.01}}
    assert gptq_at(rows, 2.0) == pytest.approx(1.0)
    assert gptq_at(rows, 2.5) == pytest.approx(0.1)
    assert gptq_at(rows, 3.1) is None
    assert gptq_at({}, 2.5) is None


def found(row: Row, kl: float) -> dict[str, Any]:
    return {
        "bits": 3.0, "kl": kl, "kl_ci95": [kl, kl], "perplexity": 9.0, "top1": 0.5, "seconds": 1.0,
        "accepted": None, "device": "a GPU", "processes": 8,
    }  # fmt: skip


def test_rows_of_other_runs_are_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"model": "m", "text": "t", "windows": 2, "sequences": 2}
    paths = [tmp_path / name / "methods.json" for name in "ab"]
    for path, row in zip(paths, (CURVE[0], ROWS[0]), strict=True):
        Known(path, settings).add(row.key, found(row, 0.5))
    doc = tmp_path / "doc.md"
    monkeypatch.setattr(sys, "argv", [
        "methods.py", "--render-only", "--work", str(tmp_path), "--doc", str(doc),
        *(word for path in paths for word in ("--merge", str(path))),
    ])  # fmt: skip
    methods.main()
    told = doc.read_text()
    assert "8 processes" in told
    assert told.count("| 3.000 | 0.5000 |") == 2
    known = Known(tmp_path / "methods.json")
    assert set(known.rows) == {CURVE[0].key, ROWS[0].key}
    with pytest.raises(SystemExit, match="not of"):
        Known(paths[0], settings | {"windows": 3})


def test_a_row_that_fails_is_told_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 12)
    better = Reconstruct(method="cbq", options={"steps": 2})
    rows = [
        Row("Some", "rtn", {"bits": 9}),
        Row("Some", "rtn", {"bits": 4}),
        Row("Some", "gptq", {"bits": 3}, "cbq", reconstruct=better),
    ]
    monkeypatch.setattr(methods, "wanted", lambda *_: rows)
    monkeypatch.setattr(methods, "write", lambda *_: None)
    monkeypatch.setattr(sys, "argv", [
        "methods.py", "--text", str(text), "--model", str(save_tiny(tmp_path / "tiny")),
        "--windows", "2", "--sequences", "2", "--work", str(tmp_path),
    ])  # fmt: skip
    with pytest.raises(SystemExit, match="1 of 3 rows failed"):
        methods.main()
    assert "bits must be 1 to 8" in capsys.readouterr().out
    kept = json.loads((tmp_path / "methods.json").read_text())["rows"]
    assert set(kept) == {row.key for row in rows[1:]}
    with pytest.raises(SystemExit, match="1 of 1 rows failed"):  # what is known stays
        methods.main()
