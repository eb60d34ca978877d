"""The Python API: fit, load, generate, resize, measure, plan, inspect."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import pliant
import pliant.api
from pliant.budget import format_size
from pliant.errors import BudgetError, PliantError

from .tiny import CONTEXT, memory


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch, request):
    if "real" not in request.keywords:
        request.getfixturevalue("machine")
        monkeypatch.setenv("PLIANT_CACHE", str(tmp_path / "cache"))


def test_importing_pliant_imports_no_torch_and_its_functions_stay_functions():
    program = """
import sys, pliant, pliant.cli
assert "torch" not in sys.modules and "transformers" not in sys.modules
import pliant.fit.recipe, pliant.measure, pliant.plan.table
from pliant.fit import FitResult
from pliant import fit, plan
import inspect
for name in ("bench", "fit", "load", "measure", "plan", "inspect"):
    assert inspect.isfunction(getattr(pliant, name)) and name in dir(pliant), name
assert fit is pliant.fit and sys.modules["pliant.fit"].FitResult is FitResult
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_fit_load_generate_resize_measure(tiny_model, tiny_recipe, text_file, tmp_path):
    budget = memory(tiny_model)
    found = pliant.fit(
        tiny_model, budget, tmp_path / "out", context=CONTEXT, recipe=tiny_recipe, text=text_file
    )
    assert found.planned_bytes <= budget
    assert found.planned_bytes + found.breakdown.free == budget
    model = pliant.load(tmp_path / "out")
    assert model.plan.planned_bytes == found.planned_bytes
    ids = torch.arange(5, 25)[None]
    assert model.generate(ids, max_new_tokens=4, min_new_tokens=4).shape == (1, 24)
    ladder = model.artifact.ladder
    small = pliant.measure(model, tiny_model, text_file, window=64, limit=4, timed=False)
    plan = model.resize(weights=ladder.largest_bytes)
    assert plan.weight_bytes > found.smallest_bytes
    large = pliant.measure(model, tiny_model, text_file, window=64, limit=4)
    assert 0 <= large["kl"] < small["kl"]
    assert large["decode_tps"] > 0
    assert small["decode_tps"] is None
    again = pliant.measure(
        tmp_path / "out", str(tiny_model), text_file.read_text(), weights=ladder.largest_bytes,
        window=64, limit=4, timed=False,
    )  # fmt: skip
    assert again["kl"] == pytest.approx(large["kl"], rel=1e-3)


def test_a_model_does_not_differ_from_itself(tiny_model, text_file):
    found = pliant.measure(tiny_model, tiny_model, text_file, window=32, limit=2, timed=False)
    assert found["kl"] == 0
    assert found["top1"] == 1
    assert found["perplexity"] == found["perplexity_original"]
    assert found["weight_bytes"] == sum(
        p.numel() * 4 for p in pliant.api.opened(pliant.api.find(tiny_model)).parameters()
    )


def test_an_original_too_big_for_this_machine_is_read_layer_by_layer(
    tiny_model, tiny_artifact, text_file, monkeypatch
):
    options = {"window": 32, "limit": 2, "timed": False}
    whole = pliant.measure(tiny_artifact, tiny_model, text_file, **options)
    monkeypatch.setenv("PLIANT_CACHE", "/nonexistent")
    monkeypatch.setattr(
        pliant.api.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000)
    )
    streamed = pliant.measure(tiny_artifact, tiny_model, text_file, **options)
    assert streamed["kl"] == pytest.approx(whole["kl"], rel=1e-4)


def test_parts_of_a_text_differ(tiny_artifact, tiny_model, text_file):
    kl = [
        pliant.measure(
            tiny_artifact, tiny_model, text_file, part=part, window=32, timed=False, limit=2
        )["kl"]
        for part in ("all", "evaluation", "calibration")
    ]
    assert kl[0] == kl[1] != kl[2]


def test_what_measure_cannot_do_is_said(tiny_artifact, tiny_model, text_file):
    with pytest.raises(PliantError, match="this is none"):
        pliant.measure(tiny_model, tiny_model, text_file, weights=80_000, window=32)
    model = pliant.api.opened(pliant.api.find(tiny_model))
    with pytest.raises(PliantError, match="tokenizer="):
        pliant.measure(model, model, text_file)
    ids = torch.arange(64).view(2, 32)
    assert pliant.measure(model, model, ids, timed=False)["kl"] == 0
    with pytest.raises(PliantError, match="fewer than a window"):
        pliant.measure(tiny_artifact, tiny_model, "a few words", window=32)
    with pytest.raises(PliantError, match="no file"):
        pliant.measure(tiny_artifact, tiny_model, text_file.with_name("absent.txt"))


def test_plan_takes_sizes_as_text(tiny_model):
    table = pliant.plan(tiny_model, "6MiB", context=32)
    assert table.memory == 6 * 2**20
    assert table.given
    with pytest.raises(BudgetError, match="not a size"):
        pliant.plan(tiny_model, "six")


def test_plan_predicts_speed_unless_told_not_to(tiny_model, machine):
    rows = pliant.plan(tiny_model, "6MiB", context=32).rows
    speeds = [row.tokens_per_second for row in rows]
    assert speeds == sorted(speeds)
    assert all(row.tokens_per_second != row.ceiling for row in rows)
    machine.timed.clear()
    table = pliant.plan(tiny_model, "6MiB", context=32, timed=False)
    assert not table.predicted
    assert all(row.tokens_per_second == row.ceiling for row in table.rows)
    assert not machine.timed


def test_inspect_says_what_is_open(tiny_artifact):
    found = pliant.inspect(tiny_artifact, verify=True)
    sizes = {t: own[0]["nbytes"] for t, own in found["rungs"].items()}
    assert found["smallest_bytes"] == found["fixed_bytes"] + sum(sizes.values())
    opened = sum(cell["nbytes"] for cell in found["allocation"])
    assert found["weight_bytes"] == found["fixed_bytes"] + opened
    damage = [point["damage"] for point in found["climb"]]
    assert damage == sorted(damage, reverse=True)
    assert damage[-1] <= found["damage"] <= damage[0]
    speeds = [point["tokens_per_second"] for point in found["climb"]]
    assert speeds == sorted(speeds, reverse=True)
    assert speeds[-1] <= found["tokens_per_second"] <= speeds[0]
    untimed = pliant.inspect(tiny_artifact, timed=False)
    assert {point["tokens_per_second"] for point in untimed["climb"]} == {None}
    low = pliant.inspect(tiny_artifact, weights=found["smallest_bytes"])
    assert {cell["rung"] for cell in low["allocation"]} == {0}
    assert low["damage"] == damage[0]
    with pytest.raises(BudgetError, match=str(found["smallest_bytes"])):
        pliant.inspect(tiny_artifact, weights=found["smallest_bytes"] - 1)


def test_bench_takes_one_size_or_several(tiny_artifact):
    found = pliant.inspect(tiny_artifact)
    low, high = found["smallest_bytes"], found["largest_bytes"]
    one = pliant.bench(tiny_artifact, weights=low, device="cpu", quick=True)
    (row,) = one["rows"]
    assert row["weight_bytes"] == low
    assert row["predicted_tps"] == pytest.approx(found["climb"][0]["tokens_per_second"], rel=0.02)
    assert row["decode_tps"] > 0
    two = pliant.bench(tiny_artifact, weights=[str(high), low], device="cpu", quick=True)
    assert [row["weight_bytes"] for row in two["rows"]] == [low, high]
    with pytest.raises(PliantError, match="give its directory"):
        pliant.bench(memory="1MiB")


def test_the_smallest_budget_is_named_and_works(tiny_model, tiny_recipe, tmp_path):
    options = {"context": CONTEXT, "recipe": tiny_recipe}
    with pytest.raises(BudgetError) as error:
        pliant.fit(tiny_model, memory(tiny_model, 2000), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    least = int(str(error.value).split("(")[1].split(" bytes")[0])
    assert format_size(least) in str(error.value)
    found = pliant.fit(tiny_model, least, dry_run=True, **options)
    assert found.planned_bytes == least
    with pytest.raises(BudgetError):
        pliant.fit(tiny_model, least - 1, dry_run=True, **options)


@pytest.mark.real
def test_the_bundled_model_loads_answers_resizes_and_is_measured(artifact, smol, text_file):
    model = pliant.load(artifact)
    assert 0.97 * 2**27 <= model.plan.planned_bytes <= 2**27
    tokenizer = model.artifact.tokenizer()
    model.resize(memory="200MiB")
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0])
    found = pliant.measure(model, smol, text_file, window=64, limit=2, timed=False)
    assert found["kl"] < 0.05
    assert found["tokens"] == 62
    assert found["weight_bytes"] <= 1.01 * model.plan.weight_bytes
