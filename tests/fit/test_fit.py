"""fit: what goes in decides every byte that comes out, however often it was interrupted."""

from __future__ import annotations

import errno
import json
import shutil
import threading
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from pliant.errors import BudgetError, CheckpointError, PliantError, RecipeError
from pliant.fit import Recipe, fit, pipeline, read_recipe, scratch, summary
from pliant.fit.background import Background
from pliant.fit.recipe import Rule, RungSpec, default_recipe
from pliant.ladder import Artifact, shard, writer
from pliant.ladder.live import load, plan_opening
from pliant.measure import tensor_bytes
from pliant.model import StreamedModel, open_checkpoint
from pliant.observe import sweep as sweep_module
from tests.fit.tiny import CONTEXT, checkpoint, memory, recipe, sums, text

IDS = torch.tensor([[1, 7, 42, 100, 5, 9]])


def run(source: Path, out: Path | None, weights: int = 90_000, **options: Any) -> Any:
    config = open_checkpoint(source).config
    settings: dict[str, Any] = {"recipe": recipe(), "context": CONTEXT} | options
    return fit(source, memory(config, weights), out, **settings)


@pytest.fixture(scope="module")
def fitted(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One uninterrupted run that tests may read."""
    out = tmp_path_factory.mktemp("fitted") / "out"
    run(llama, out)
    return out


# The same inputs, the same bytes


def test_the_same_inputs_and_seed_give_the_same_bytes(
    llama: Path, fitted: Path, tmp_path: Path
) -> None:
    torch.manual_seed(123)
    run(llama, tmp_path / "other-name")
    assert sums(tmp_path / "other-name") == sums(fitted)
    assert [path.name for path in tmp_path.iterdir()] == ["other-name"], "nothing is left beside it"


def test_another_seed_gives_another_model(llama: Path, fitted: Path, tmp_path: Path) -> None:
    run(llama, tmp_path / "out", recipe=recipe(seed=1))
    mine, theirs = sums(tmp_path / "out"), sums(fitted)
    assert mine["block-00000.safetensors"] != theirs["block-00000.safetensors"]


def test_the_recipe_beside_the_output_reproduces_it(
    llama: Path, fitted: Path, tmp_path: Path
) -> None:
    run(llama, tmp_path / "out", recipe=fitted / "recipe.yaml", seed=99, effort="best")
    assert sums(tmp_path / "out") == sums(fitted)


def test_rungs_do_not_depend_on_the_budget(llama: Path, fitted: Path, tmp_path: Path) -> None:
    run(llama, tmp_path / "out", weights=60_000)
    mine, theirs = sums(tmp_path / "out"), sums(fitted)
    assert {n for n in theirs if mine[n] != theirs[n]} == {"ladder.json"}


# Interrupted


class Stop:
    """A progress callback that is interrupted at its `at`-th call."""

    def __init__(self, at: int = 10**9) -> None:
        self.calls: list[tuple[str, int, int]] = []
        self.at = at

    def __call__(self, stage: str, done: int, of: int) -> None:
        self.calls.append((stage, done, of))
        assert 0 <= done <= of
        if len(self.calls) == self.at:
            raise KeyboardInterrupt


def test_interrupted_at_any_stage_it_goes_on_to_the_same_bytes(
    llama: Path, fitted: Path, tmp_path: Path
) -> None:
    whole = Stop()
    run(llama, tmp_path / "whole", progress=whole)
    stages = [stage for stage, _, _ in whole.calls]
    assert list(dict.fromkeys(stages)) == [
        "writing text", "reading text", "building rungs", "measuring", "writing",
        "measuring the cache",
    ]  # fmt: skip
    firsts = {stages.index(stage) + 1 for stage in stages}
    lasts = {len(stages) - stages[::-1].index(stage) for stage in stages}
    for at in sorted(firsts | lasts | set(range(5, len(stages), 25))):
        out = tmp_path / f"out-{at}"
        with pytest.raises(KeyboardInterrupt):
            run(llama, out, progress=Stop(at))
        assert not out.exists() or at == len(stages), "never half an artifact"
        if not out.exists():
            resumed = Stop()
            run(llama, out, progress=resumed)
            assert at < 30 or len(resumed.calls) < len(whole.calls), "finished work is taken up"
        assert sums(out) == sums(fitted), f"interrupted at {whole.calls[at - 1]}"
        assert not out.with_name(out.name + ".partial").exists()


def test_interrupted_again_and_again(llama: Path, fitted: Path, tmp_path: Path) -> None:
    for at in range(10, 400, 10):
        try:
            run(llama, tmp_path / "out", progress=Stop(at))
            break
        except KeyboardInterrupt:
            continue
    assert sums(tmp_path / "out") == sums(fitted)


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_interrupted_between_a_shard_and_its_gradient(
    family: str, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Biases are added apart when multiplies are watched: a resumed pass must round the same."""
    checkpoint(tmp_path / "model", family)
    run(tmp_path / "model", tmp_path / "whole", weights=120_000)
    real, calls = pipeline._Job._save_gradient, []

    def interrupted(self: Any, *args: Any) -> None:
        calls.append(args)
        if len(calls) == at:
            raise KeyboardInterrupt
        real(self, *args)

    monkeypatch.setattr(pipeline._Job, "_save_gradient", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "model", tmp_path / "out", weights=120_000)
    run(tmp_path / "model", tmp_path / "out", weights=120_000)
    assert sums(tmp_path / "out") == sums(tmp_path / "whole")


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are written in a thread and codes are held, as they are beside a GPU."""
    monkeypatch.setattr(pipeline, "Background", partial(Background, threaded=True))
    monkeypatch.setattr(pipeline, "held_bytes", lambda device: {"cpu": 1 << 30})


class Crash(BaseException):
    """The process ends here."""


class Steps:
    """Everything that a fit does to its files, in order; at step `at` it crashes instead."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[str, bool]] = []
        self.at = 10**9
        for owner, name in (
            (shard.os, "fsync"), (shard.os, "replace"), (Path, "replace"), (Path, "unlink"),
            (writer.Writer, "_save"),
        ):  # fmt: skip
            monkeypatch.setattr(owner, name, self._counted(name, getattr(owner, name)))

    def _counted(self, name: str, real: Any) -> Any:
        def step(*args: Any, **options: Any) -> Any:
            if options != {"missing_ok": True}:  # tidying up, which a crash would not do
                self.seen.append((name, threading.current_thread() is threading.main_thread()))
                if len(self.seen) >= self.at:
                    raise Crash
            return real(*args, **options)

        return step


def test_written_beside_it_gives_the_same_bytes(
    beside: None, llama: Path, fitted: Path, tmp_path: Path
) -> None:
    run(llama, tmp_path / "out")
    assert sums(tmp_path / "out") == sums(fitted)


def test_a_crash_at_any_step_of_writing_beside_goes_on_to_the_same_bytes(
    beside: None, llama: Path, fitted: Path, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        whole = Steps(patch)
        run(llama, tmp_path / "whole")
    crashes = [at for at, (_, main) in enumerate(whole.seen, 1) if not main]
    assert len(crashes) >= 3 * 6, "shard, journal and gradient of three layers"
    for at in crashes[len(crashes) // 3 :]:  # of the first of three layers enough is tested below
        out = tmp_path / f"out-{at}"
        with pytest.MonkeyPatch.context() as patch:
            steps = Steps(patch)
            steps.at = at
            with pytest.raises(Crash):
                run(llama, out)
        assert not out.exists()
        partial = out.with_name(out.name + ".partial")
        (partial / "block-00000.safetensors.tmp").write_bytes(b"half")  # a crash tidies nothing
        (partial / "work" / "gradient-00000.tmp").write_bytes(b"half")
        for found in (partial / "work").glob("gradient-*.safetensors"):
            above = range(int(found.stem.split("-")[1]), 3)
            again = writer.Writer(out, key=open_key(partial))
            assert all(again.has(f"block-{index:05d}") for index in above)
        run(llama, out)
        assert sums(out) == sums(fitted), f"crashed at {whole.seen[at - 1]}, step {at}"


def open_key(partial: Path) -> str:
    return str(json.loads((partial / writer.JOURNAL).read_text())["key"])


@pytest.mark.parametrize("at", [1, 3, 4, 5])
def test_a_disk_that_is_full_while_writing_beside(
    at: int, beside: None, llama: Path, fitted: Path, tmp_path: Path
) -> None:
    """One clear error, whether shard, journal or gradient."""
    calls = []

    def full(real: Any) -> Any:
        def step(*args: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                calls.append(args)
                if len(calls) == at:
                    raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args)

        return step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard.os, "replace", full(shard.os.replace))
        patch.setattr(Path, "write_bytes", full(Path.write_bytes))
        with pytest.raises(PliantError, match=r"is full: .* free some space"):
            run(llama, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "out.partial").glob("*.safetensors.tmp"))
    run(llama, tmp_path / "out")
    assert sums(tmp_path / "out") == sums(fitted)


def test_interrupted_while_writing_beside(
    beside: None, llama: Path, fitted: Path, tmp_path: Path
) -> None:
    whole = Stop()
    run(llama, tmp_path / "whole", progress=whole)
    at = next(i for i, call in enumerate(whole.calls, 1) if call[:2] == ("building rungs", 9))
    with pytest.raises(KeyboardInterrupt):
        run(llama, tmp_path / "out", progress=Stop(at))
    assert len(list((tmp_path / "out.partial").glob("block-*.safetensors"))) == 1
    assert len(list((tmp_path / "out.partial" / "work").glob("gradient-*.safetensors"))) == 1
    run(llama, tmp_path / "out")
    assert sums(tmp_path / "out") == sums(fitted)


def test_a_shard_that_was_damaged_before_the_run_goes_on_is_built_again(
    llama: Path, fitted: Path, tmp_path: Path
) -> None:
    """Though the gradient below it is on disk."""
    with pytest.raises(KeyboardInterrupt):
        run(llama, tmp_path / "out", progress=lambda stage, done, of: stop_at(stage, "measuring"))
    top = sorted((tmp_path / "out.partial").glob("block-*.safetensors"))[-1]
    top.write_bytes(top.read_bytes()[:-1] + b"\x77")
    run(llama, tmp_path / "out")
    assert sums(tmp_path / "out") == sums(fitted)


def stop_at(stage: str, last: str) -> None:
    if stage == last:
        raise KeyboardInterrupt


def test_left_work_of_another_recipe_is_not_taken_up(
    llama: Path, fitted: Path, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(llama, tmp_path / "out", recipe=recipe(seed=1), progress=Stop(40))
    run(llama, tmp_path / "out")
    assert sums(tmp_path / "out") == sums(fitted)


# Budgets


def test_below_the_smallest_size(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="smallest size") as caught:
        run(llama, tmp_path / "out", weights=1000)
    least = int(str(caught.value).split("(")[1].split(" bytes")[0])
    assert list(tmp_path.iterdir()) == []
    fit(llama, least, tmp_path / "out", recipe=recipe(), context=CONTEXT)
    with pytest.raises(BudgetError):
        fit(llama, least - 1, tmp_path / "less", recipe=recipe(), context=CONTEXT)


def test_a_smallest_size_that_was_underestimated(llama: Path, tmp_path: Path) -> None:
    """Sparse outliers are not in the estimate; the refusal comes before anything is written."""
    rungs = (RungSpec(method="squeezellm", options={"bits": 3, "outliers": 0.2}),)
    odd = recipe().model_copy(update={"rules": (Rule(rungs=rungs),)})
    with pytest.raises(BudgetError, match="smallest size"):
        run(llama, tmp_path / "out", weights=70_000, recipe=odd)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "mixtral"])
def test_above_the_original_it_is_kept_bit_for_bit(dtype: str, family: str, tmp_path: Path) -> None:
    original = checkpoint(tmp_path / "model", family, dtype)
    found = run(tmp_path / "model", tmp_path / "out", weights=10**8)
    assert "original fits" in found.note
    assert found.damage == 0
    held = tensor_bytes(load(tmp_path / "out"))
    assert found.breakdown.weights + found.breakdown.embeddings == held
    with torch.no_grad():
        torch.testing.assert_close(
            load(tmp_path / "out")(IDS).logits, original(IDS).logits, atol=1e-5, rtol=1e-4
        )
    artifact = Artifact.open(tmp_path / "out")
    kept = {name: artifact.load_code(name, 0) for name in artifact.ladder.rungs}
    weights = dict(original.named_parameters())
    for t in artifact.targets:
        stored = weights[t["parameter"]].data
        stored = stored if t["expert"] is None else stored[t["expert"]]
        stored = stored.t() if t["transposed"] else stored
        assert torch.equal(kept[t["name"]].decode(), stored)


def test_exactly_the_original_fits(llama: Path, tmp_path: Path) -> None:
    opened = open_checkpoint(llama)
    small = sum(t.numel() for _, t in StreamedModel(opened).others())  # held in 32 bits
    nbytes = opened.nbytes + small * (4 - opened.dtype.itemsize)
    assert "original fits" in run(llama, tmp_path / "a", weights=nbytes).note
    assert run(llama, tmp_path / "b", weights=nbytes - 1).note == ""


def test_the_budget_is_used_and_never_passed(tmp_path: Path) -> None:
    checkpoint(tmp_path / "model", num_hidden_layers=8)
    out, config = tmp_path / "out", open_checkpoint(tmp_path / "model").config
    found = run(tmp_path / "model", out, weights=200_000, recipe=recipe(measurements=0))
    low, high = found.smallest_bytes, found.largest_bytes
    for share in (0.05, 0.1, 0.3, 0.5, 0.7, 0.9):
        room = int(low + share * (high - low))
        plan = plan_opening(Artifact.open(out), memory(config, room))
        assert 0.97 * room <= plan.weight_bytes <= room
        assert plan.planned_bytes + plan.breakdown.free == memory(config, room)


def test_result_and_summary_say_the_same(llama: Path, fitted: Path) -> None:
    found = summary(fitted)
    room = 90_000
    assert found.budget_bytes == memory(open_checkpoint(llama).config, room)
    assert found.planned_bytes == found.breakdown.total <= found.budget_bytes
    assert found.breakdown.weights + found.breakdown.embeddings <= room
    assert found.targets == 23
    assert found.damage is not None
    assert found.damage > 0
    assert found.as_dict()["path"] == str(fitted)


# Every size of one artifact


def test_twelve_sizes(fitted: Path) -> None:
    artifact = Artifact.open(fitted)
    low, high = artifact.ladder.smallest_bytes, artifact.ladder.largest_bytes
    assert high > 3 * low
    plans = []
    for step in range(12):
        asked = low + (high - low) * step // 11
        plan = plan_opening(artifact, weights=asked)
        assert plan.weight_bytes <= asked
        plans.append(plan)
    assert plans[0].weight_bytes == low
    assert plans[-1].weight_bytes == high
    sizes = [plan.weight_bytes for plan in plans]
    assert sizes == sorted(sizes)
    model = load(fitted, weights=low)
    spread = []
    for plan in plans[::4]:
        model.resize(weights=plan.weight_bytes)
        with torch.no_grad():
            spread.append(model(IDS).logits)
    assert all(bool(torch.isfinite(logits).all()) for logits in spread)


def test_damage_falls_along_the_frontier(fitted: Path) -> None:
    frontier = list(Artifact.open(fitted).ladder.frontier())
    assert len(frontier) > 20
    for (size, damage), (more, less) in pairwise(frontier):
        assert size < more
        assert damage > less >= 0


def test_more_bytes_measure_less_damage(llama: Path, fitted: Path) -> None:
    """On text of the model's own, the real divergence falls from the bottom to the top."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 320, (8, 24), generator=generator)
    ladder = Artifact.open(fitted).ladder
    with torch.no_grad():
        p = load_original(llama)(ids).logits.log_softmax(-1)
        found = []
        for share in (0.0, 0.25, 0.5, 1.0):
            size = int(
                ladder.smallest_bytes + share * (ladder.largest_bytes - ladder.smallest_bytes)
            )
            q = load(fitted, weights=size)(ids).logits.log_softmax(-1)
            found.append(float((p.exp() * (p - q)).sum(-1).mean()))
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.02 * found[0]


def load_original(directory: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


# Dry runs


def test_a_dry_run_writes_nothing_and_foretells(llama: Path, fitted: Path, tmp_path: Path) -> None:
    before = sums(llama)
    found = run(llama, tmp_path / "out", dry_run=True)
    assert list(tmp_path.iterdir()) == []
    assert sums(llama) == before
    assert found.path is None
    assert found.damage is None
    real = summary(fitted)
    assert found.smallest_bytes == real.smallest_bytes
    assert found.budget_bytes == real.budget_bytes
    assert found.original_bytes == real.original_bytes
    assert abs(found.planned_bytes - real.planned_bytes) < 0.03 * real.planned_bytes
    assert run(llama, None, dry_run=True).planned_bytes == found.planned_bytes


def test_a_dry_run_is_refused_what_a_run_is(llama: Path) -> None:
    with pytest.raises(BudgetError, match="smallest size"):
        run(llama, None, weights=1000, dry_run=True)


# Bad input


def test_an_output_is_needed_and_must_be_free(llama: Path, fitted: Path, tmp_path: Path) -> None:
    with pytest.raises(PliantError, match="output directory"):
        run(llama, None)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(PliantError, match="exists"):
        run(llama, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    mine = Path(shutil.copytree(fitted, tmp_path / "mine"))
    with pytest.raises(PliantError, match="exists"):
        run(llama, mine)
    run(llama, mine, overwrite=True, weights=60_000)
    assert summary(mine).breakdown.weights < summary(fitted).breakdown.weights


def test_a_context_beyond_the_models_is_told_before_the_work(llama: Path, tmp_path: Path) -> None:
    seen = Stop()
    with pytest.raises(BudgetError, match="context of 4096"):
        fit(llama, "1GiB", tmp_path / "out", context=4096, progress=seen, recipe=recipe())
    assert seen.calls == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "model.norm.weight"]
)
def test_a_weight_that_is_not_finite(value: float, name: str, llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[5] = value
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        run(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_text_of_the_users(llama: Path, tmp_path: Path) -> None:
    source = text(tmp_path / "text.txt")
    run(llama, tmp_path / "a", recipe=recipe(source=str(source)))
    run(llama, tmp_path / "b", text=source)
    assert sums(tmp_path / "a") == sums(tmp_path / "b"), "text= is the recipe's text"
    assert Artifact.open(tmp_path / "a").recipe["calibration"]["text"] == str(source)
    source.write_text(source.read_text()[::-1])
    run(llama, tmp_path / "c", text=source)
    assert (
        sums(tmp_path / "a")["block-00000.safetensors"]
        != (sums(tmp_path / "c")["block-00000.safetensors"])
    )


@pytest.mark.parametrize(
    ("content", "said"), [("w1 w2 w3", "fewer than a window"), ("", "no text"), (" \n", "no text")]
)
def test_text_that_is_too_short(content: str, said: str, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(content)
    with pytest.raises(PliantError, match=said):
        run(llama, tmp_path / "out", text=tmp_path / "text.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_one_window_of_text_is_enough(llama: Path, tmp_path: Path) -> None:
    source = text(tmp_path / "text.txt", tokens=25)
    run(llama, tmp_path / "out", text=source)
    assert Artifact.open(tmp_path / "out").provenance["calibration"]["sequences"] == 1
    assert Artifact.open(tmp_path / "out").provenance["samples"] == 0


def test_a_recipe_that_is_wrong_is_told_before_the_work(llama: Path, tmp_path: Path) -> None:
    seen = Stop()
    bad = recipe().model_copy(
        update={"rules": (Rule(rungs=(RungSpec(method="gptq", options={"bit": 3}),)),)}
    )
    with pytest.raises(RecipeError, match="no option 'bit'"):
        run(llama, tmp_path / "out", recipe=bad, progress=seen)
    assert seen.calls == []
    assert list(tmp_path.iterdir()) == []


# Families


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "qwen3", "gemma2", "llama_tied", "phi"])
def test_families_from_checkpoint_to_logits(family: str, tmp_path: Path) -> None:
    original = checkpoint(tmp_path / "model", family)
    found = run(tmp_path / "model", tmp_path / "probe", dry_run=True, weights=150_000)
    out = tmp_path / "out"
    low, high = found.smallest_bytes, found.largest_bytes
    run(tmp_path / "model", out, weights=int(low + 0.7 * (high - low)))
    model = load(out)
    with torch.no_grad():
        logits, expected = model(IDS).logits, original(IDS).logits
    assert bool(torch.isfinite(logits).all())
    model.resize(weights=model.artifact.ladder.largest_bytes)
    with torch.no_grad():
        near = model(IDS).logits
    assert (near - expected).norm() < 0.15 * expected.norm(), "8 bits are near the original"
    assert (near - expected).norm() < (logits - expected).norm()
    assert model.generate(IDS, max_new_tokens=3, do_sample=False).shape == (1, 9)


def test_methods_of_every_kind_in_one_recipe(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "calibration: {sequences: 4, length: 24}\n"
        "search: {measurements: 2, sequences: 1}\n"
        "rules:\n"
        "- {targets: '*q_proj*', rungs: [{method: squeezellm, bits: 3}, keep]}\n"
        "- {targets: '*down_proj*', rungs: [{method: lorc, bits: 2, rank: 4}]}\n"
        "- {targets: '*up_proj*', rungs: [{method: eora, base: rtn, bits: 2, rank: 4}]}\n"
        "- {targets: '*gate_proj*', rungs: [{method: super_weight, bits: 4}]}\n"
        "- {targets: '*o_proj*', rungs: [{method: llm_int8}]}\n"
        "- {kind: embedding, rungs: [{method: gptq, bits: 4}]}\n"
    )
    run(llama, tmp_path / "out", weights=150_000, recipe=tmp_path / "recipe.yaml")
    artifact = Artifact.open(tmp_path / "out")
    used = {rung.method for rungs in artifact.ladder.rungs.values() for rung in rungs}
    assert {"squeezellm", "lorc", "eora", "super_weight", "llm_int8", "gptq", "rtn"} <= used
    embedding = artifact.ladder.rungs["model.embed_tokens.weight"]
    assert [rung.method for rung in embedding] == ["rtn"], "only looked up: no second moment"
    with torch.no_grad():
        assert bool(torch.isfinite(load(tmp_path / "out")(IDS).logits).all())
    again = read_recipe(tmp_path / "out" / "recipe.yaml", default_recipe())
    assert isinstance(again, Recipe)


def test_experts_that_no_text_reached_still_have_every_rung(tmp_path: Path) -> None:
    """Without an observation they are rounded, and go up the ladder last, but they do go up."""
    checkpoint(tmp_path / "model", "mixtral", num_local_experts=8)
    short = recipe(measurements=0)
    short = short.model_copy(
        update={"calibration": short.calibration.model_copy(update={"sequences": 1, "length": 2})}
    )
    out = tmp_path / "out"
    run(tmp_path / "model", out, weights=400_000, recipe=short)
    artifact = Artifact.open(out)
    silent = [
        name for name, rungs in artifact.ladder.rungs.items()
        if "experts" in name and all(rung.method == "rtn" for rung in rungs)
    ]  # fmt: skip
    assert silent
    for name in silent:
        assert len(artifact.ladder.rungs[name]) == 3
    last = [step.target for step in artifact.ladder.climb][-len(silent) :]
    assert set(last) <= set(silent) | {"model.embed_tokens.weight"}


@pytest.mark.parametrize("stage", ["_save", "_store"])
def test_a_full_disk_is_told_and_the_run_goes_on_later(
    stage: str, llama: Path, fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer inputs and gradients are work in progress too."""
    full = OSError(errno.ENOSPC, "No space left on device")

    def refuse(*args: Any, **options: Any) -> None:
        raise full

    with monkeypatch.context() as patch:
        if stage == "_save":
            patch.setattr(sweep_module, "_save", refuse)
        else:
            patch.setattr(scratch, "write_shard", refuse)
        with pytest.raises(PliantError, match="is full"):
            run(llama, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run(llama, tmp_path / "out")
    assert sums(tmp_path / "out") == sums(fitted)
