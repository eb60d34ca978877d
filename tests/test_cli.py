"""Every verb from the outside: what it prints, its JSON, its exit codes."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys

import pytest

import pliant
import pliant.api
from pliant.bench import kernels
from pliant.bench.samples import COMMON
from pliant.cli import console, main
from pliant.plan import Bandwidth, table

from .tiny import CONTEXT, bytes_of, memory


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch, request):
    if "real" not in request.keywords:
        request.getfixturevalue("machine")
        monkeypatch.setenv("PLIANT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def call(capsys):
    """Run a command line: its exit status, stdout and stderr."""

    def run(*arguments):
        capsys.readouterr()
        status = main([str(a) for a in arguments])
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


@pytest.fixture
def ask(call):
    """Run a command line with --json that must succeed: the object."""

    def run(*arguments):
        status, out, err = call(*arguments, "--json")
        assert status == 0, err
        return json.loads(out)

    return run


@pytest.fixture
def fails(call):
    """Run a command line that must fail with `status`: its one line on stderr."""

    def run(status, *arguments):
        found, out, err = call(*arguments)
        lines = err.strip().splitlines()
        assert (found, out) == (status, ""), err
        assert lines[-1].startswith("error: ")
        assert "Traceback" not in err
        return lines[-1]

    return run


@pytest.fixture
def fit_tiny(tiny_model, tiny_recipe):
    """Arguments that fit the tiny model into `out`."""

    def arguments(out, *more):
        size = memory(tiny_model)
        return ["fit", tiny_model, "--memory", size, "--context", CONTEXT, "--recipe", tiny_recipe,
                "-o", out, *more]  # fmt: skip

    return arguments


def keys(breakdown):
    assert set(breakdown) == {"weights", "embeddings", "kv_cache", "activations", "free"}
    return sum(breakdown.values())


# Without a model


def test_help_and_version_need_no_torch():
    program = "import sys; from pliant.cli import main; main(sys.argv[1:])"
    for arguments in (["--version"], ["--help"], [], ["fit", "--help"]):
        code = f"{program}; assert 'torch' not in sys.modules"
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert pliant.__version__ in done.stdout or "Usage: pliant" in done.stdout


def test_wrong_usage_is_one_line_and_2(fails):
    assert "MODEL" in fails(2, "fit").upper()
    assert "--nonsense" in fails(2, "plan", "x", "--nonsense")
    assert "pliant plan --help" in fails(2, "plan", "x", "--context", "many")
    assert "unknown" in fails(2, "unknown")


def test_methods(call, ask):
    found = ask("methods")
    assert found["gptq"]["needs"] == ["second_moment"]
    assert found["gptq"]["options"]["bits"] == 4
    assert all(m["paper"] and m["kind"] and m["summary"] for m in found.values())
    status, out, _ = call("methods")
    assert status == 0
    assert all(name in out for name in found)


def test_progress_is_bars_on_a_terminal_and_lines_elsewhere(monkeypatch):
    for terminal in (True, False):
        file = io.StringIO()
        monkeypatch.setattr(
            console, "stderr", lambda f=file, t=terminal: console.Console(file=f, force_terminal=t)
        )
        with console.Stages() as stages:
            for done in range(4):
                stages("building rungs", done, 3)
        assert ("━" in file.getvalue()) is terminal
        assert "building rungs" in file.getvalue()
        if not terminal:
            assert file.getvalue().splitlines()[-1].startswith("building rungs: 3 of 3")


# On a tiny model


def test_fit_and_inspect(tiny_model, fit_tiny, call, ask, tmp_path):
    preview = ask(*fit_tiny(tmp_path / "out", "--dry-run"))
    assert preview["path"] is None
    assert not (tmp_path / "out").exists()
    found = ask(*fit_tiny(tmp_path / "out"))
    assert keys(found["breakdown"]) == found["budget_bytes"] == memory(tiny_model)
    assert found["planned_bytes"] == found["budget_bytes"] - found["breakdown"]["free"]
    assert found["bits"] > 2
    assert found["damage"] > 0
    seen = ask("inspect", tmp_path / "out", "--verify")
    assert seen["verified"]
    assert seen["planned_bytes"] == found["planned_bytes"]
    status, out, err = call(*fit_tiny(tmp_path / "out", "--overwrite"))
    assert status == 0
    assert "KV cache" in out
    assert "pliant measure" in out
    assert "building rungs" in err
    status, out, _ = call("inspect", tmp_path / "out", "--weights", found["largest_bytes"])
    assert status == 0
    assert "q_proj" in out
    assert "rtn bits=8" in out


def test_a_fit_that_was_interrupted_goes_on_to_the_same_bytes(
    tiny_model, tiny_recipe, fit_tiny, ask, tmp_path
):
    ask(*fit_tiny(tmp_path / "whole"))
    for stage, step in (("building rungs", 6), ("measuring", 2)):
        told = []

        def interrupt(name, done, of, stage=stage, step=step, told=told):
            told.append(name)
            if (name, done) == (stage, step):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            pliant.fit(
                tiny_model, memory(tiny_model), tmp_path / "parts", context=CONTEXT,
                recipe=tiny_recipe, progress=interrupt,
            )  # fmt: skip
        assert not (tmp_path / "parts").exists()
    assert "writing text" not in told
    ask(*fit_tiny(tmp_path / "parts"))
    assert bytes_of(tmp_path / "parts") == bytes_of(tmp_path / "whole")


def test_an_interrupt_is_130_and_says_how_to_go_on(fit_tiny, call, monkeypatch, tmp_path):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(pliant.api, "fit", interrupt)
    status, out, err = call(*fit_tiny(tmp_path / "out"))
    assert (status, out) == (130, "")
    assert err.strip() == "interrupted; run the same command again to go on"


def test_plan(tiny_model, call, ask, monkeypatch):
    monkeypatch.setattr(table, "bandwidth", lambda: Bandwidth("test", 1e9))
    found = ask("plan", tiny_model, "--memory", "6MiB", "--context", CONTEXT)
    assert found["memory"] == 6 * 2**20
    assert [row["bits"] for row in found["rows"]][:2] == [16, 8]
    status, out, _ = call("plan", tiny_model, "--batch", 2)
    assert status == 0
    assert "free on this machine" in out


def test_plan_tells_a_prediction_from_a_ceiling(tiny_model, call, ask, machine, monkeypatch):
    monkeypatch.setattr(table, "bandwidth", lambda: Bandwidth("test", 1e9))
    rows = ask("plan", tiny_model)["rows"]
    assert all(row["tokens_per_second"] != row["ceiling"] for row in rows)
    _, out, err = call("plan", tiny_model)
    assert "predicted from products" in out
    assert "timing products" in err
    machine.timed.clear()
    _, out, err = call("plan", tiny_model, "--no-speed")
    assert "the ceiling that" in out
    assert (err, machine.timed) == ("", [])


def test_inspect_predicts_speed_unless_told_not_to(tiny_artifact, call, ask, machine):
    found = ask("inspect", tiny_artifact)
    status, out, _ = call("inspect", tiny_artifact)
    assert status == 0
    assert f"{found['tokens_per_second']:,.1f} tokens/s" in out
    assert f"{found['climb'][0]['tokens_per_second']:,.1f}" in out
    machine.timed.clear()
    status, out, _ = call("inspect", tiny_artifact, "--no-speed")
    assert status == 0
    assert "tokens/s" not in out
    assert not machine.timed


def test_bench_of_an_artifact(tiny_artifact, call, ask):
    seen = ask("inspect", tiny_artifact)
    sizes = ["--weights", seen["smallest_bytes"], "--weights", seen["largest_bytes"]]
    line = ["bench", tiny_artifact, *sizes, "--quick", "--device", "cpu"]
    found = ask(*line)
    assert [row["weight_bytes"] for row in found["rows"]] == [sizes[1], sizes[3]]
    for row in found["rows"]:
        assert row["share"] == row["bytes_per_second"] / found["read_bytes_per_second"]
        assert row["bytes_per_second"] == row["token_bytes"] * row["decode_tps"]
    status, out, err = call(*line)
    assert status == 0
    assert "predicted" in out
    assert f"{found['rows'][1]['predicted_tps']:,.1f}" in out
    assert "sizes: 2 of 2" in err


def test_bench_of_products(call, ask, monkeypatch):
    monkeypatch.setattr(kernels, "SHAPES", ((64, 128),))
    monkeypatch.setattr(kernels, "QUICK_SECONDS", 0.0)
    monkeypatch.setattr(kernels, "beyond_cache", lambda device: 1)
    found = ask("bench", "--quick", "--device", "cpu")
    assert len(found["rows"]) == 2 * len(COMMON)
    for row in found["rows"]:
        assert row["bytes_per_second"] == row["nbytes"] / row["seconds"]
        assert row["share"] == row["bytes_per_second"] / found["read_bytes_per_second"]
    status, out, _ = call("bench", "--quick", "--device", "cpu")
    assert status == 0
    for name in COMMON:
        assert name in out
    assert "GB/s" in out


def test_mistakes_of_bench(tiny_artifact, tmp_path, fails):
    assert "give its directory" in fails(1, "bench", "--memory", "1MiB")
    assert "no directory" in fails(1, "bench", tmp_path / "absent")
    assert "not a size" in fails(5, "bench", tiny_artifact, "--memory", "much")
    assert "smallest" in fails(5, "bench", tiny_artifact, "--memory", "1KiB")
    assert "cannot be used" in fails(1, "bench", "--device", "abacus")


def test_measure(tiny_artifact, tiny_model, text_file, call, ask):
    line = ["measure", tiny_artifact, "--against", tiny_model, "--text", text_file,
            "--window", 64, "--limit", 3, "--score", "all"]  # fmt: skip
    found = ask(*line, "--no-speed")
    assert found["kl_ci95"][0] <= found["kl"] <= found["kl_ci95"][1]
    assert found["tokens"] == 3 * 63
    assert found["decode_tps"] is None
    assert {"perplexity", "perplexity_original", "top1", "weight_bytes"} <= found.keys()
    status, out, _ = call(*line)
    assert status == 0
    assert "nats a token" in out
    assert "tokens/s" in out


def test_report(tiny_artifact, tiny_model, text_file, call, ask, tmp_path):
    out = tmp_path / "page"
    line = ["measure", tiny_artifact, "--against", tiny_model, "--text", text_file]
    measured = tmp_path / "measured.json"
    measured.write_text(json.dumps(ask(*line, "--window", 64, "--limit", 2, "--no-speed")))
    found = ask("report", tiny_artifact, "-o", out, "--measured", measured)
    assert len(found["measured"]) == 1
    data = json.loads((out / "report.json").read_text())
    assert data["facts"]["Decode"].endswith("tokens/s (predicted)")
    assert data["columns"][-1] == "tokens/s, predicted"
    assert all(float(row[-1].replace(",", "")) > 0 for row in data["rows"])
    assert (out / "report.html").stat().st_size > 1_000_000
    assert json.loads((out / "measured.json").read_text()) == found["measured"]
    copy = tmp_path / "copy"
    shutil.copytree(tiny_artifact, copy)
    long = tmp_path / "long.txt"
    long.write_text(text_file.read_text() * 2)
    line = ["report", copy, "--against", tiny_model, "--text", long, "--limit", 2, "--no-speed"]
    status, said, err = call(*line)
    assert status == 0, err
    assert said.strip() == str(tmp_path / "copy-report" / "report.html")
    data = json.loads((tmp_path / "copy-report" / "report.json").read_text())
    assert "Decode" not in data["facts"]
    assert len(data["columns"]) == len(data["rows"][0]) == 7
    points = json.loads((tmp_path / "copy-report" / "measured.json").read_text())
    assert len(points) == 5
    assert points[0]["kl"] > points[-1]["kl"]
    again = ask("report", copy, "--measured", tmp_path / "copy-report" / "report.json")
    assert [p["kl"] for p in again["measured"]] == [p["kl"] for p in points]


def test_run_continues_text_without_a_template(tiny_artifact, ask, fails):
    found = ask("run", tiny_artifact, "hello", "--max-new-tokens", 5, "--temperature", 1,
                "--seed", 1)  # fmt: skip
    assert found["prompt_tokens"] == 5
    assert found["finish"] in ("length", "stop")
    assert "no chat template" in fails(1, "chat", tiny_artifact)
    assert "temperature" in fails(1, "run", tiny_artifact, "hello", "--temperature", -1)
    assert "top_h" in fails(1, "run", tiny_artifact, "hello", "--top-h", 0)
    assert "empty" in fails(1, "run", tiny_artifact, "")


# Mistakes


def test_mistakes_of_fit(tiny_model, tiny_recipe, fit_tiny, fails, tiny_artifact, tmp_path):
    out = tmp_path / "out"
    assert "absent" in fails(3, "fit", tmp_path / "absent", "--memory", "1GiB", "-o", out)
    assert "not a size" in fails(5, "fit", tiny_model, "--memory", "12 parsecs", "-o", out)
    assert "-o DIR" in fails(1, "fit", tiny_model, "--memory", "1GiB")
    assert "best" in fails(7, "fit", tiny_model, "--memory", "1GiB", "-o", out, "--effort", "most")
    least = "the smallest size"
    small = ["--memory", memory(tiny_model, 3000), "--context", CONTEXT, "--recipe", tiny_recipe]
    assert least in fails(5, "fit", tiny_model, *small, "-o", out)
    for text, about in (
        ("rules: [{rungs: [{method: magic}]}]", "magic"),
        ("rules: [{rungs: [{method: rtn, bit: 3}]}]", "'bit'"),
        ("rules: [{rungs: []}]", "rules.0.rungs"),
        ("rules: [", "not YAML"),
    ):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(text)
        line = ["fit", tiny_model, "--memory", "6MiB", "--context", CONTEXT, "-o", out]
        assert about in fails(7, *line, "--recipe", recipe)
    assert "cannot be read" in fails(7, *line, "--recipe", tmp_path / "absent.yaml")
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    assert "no text" in fails(1, *fit_tiny(out, "--text", empty))
    assert not out.exists()
    assert "exists" in fails(1, *fit_tiny(tiny_artifact))
    assert "not a Pliant artifact" in fails(1, *fit_tiny(tiny_model, "--overwrite"))


def test_a_budget_above_the_original_keeps_it_and_says_so(tiny_model, ask, tmp_path):
    found = ask("fit", tiny_model, "--memory", "1GiB", "--context", CONTEXT, "--dry-run")
    assert "the original fits" in found["note"]


def test_mistakes_of_the_other_verbs(tiny_model, tiny_artifact, text_file, fails, tmp_path):
    line = ["--against", tiny_model, "--text"]
    assert "no file" in fails(1, "measure", tiny_artifact, *line, tmp_path / "absent.txt")
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    assert "no text" in fails(1, "measure", tiny_artifact, *line, empty)
    said = fails(1, "measure", tiny_artifact, *line, text_file, "--window", 100_000)
    assert "fewer than a window of 100000" in said
    assert "score" in fails(1, "measure", tiny_artifact, *line, text_file, "--score", "most")
    assert "parts" in fails(1, "measure", tiny_artifact, *line, text_file, "--part", "most")
    assert "smallest" in fails(5, "run", tiny_artifact, "hello", "--weights", "1KiB")
    both = ["--weights", "1MiB", "--memory", "1GiB"]
    assert "not both" in fails(5, "inspect", tiny_artifact, *both)
    assert "not a Pliant artifact" in fails(1, "run", tiny_model, "hello")
    assert "no directory" in fails(1, "inspect", tmp_path / "absent")
    assert "absent" in fails(3, "plan", tmp_path / "absent")
    assert "go together" in fails(1, "report", tiny_artifact, "--against", tiny_model)
    empty.write_text("[{}]")
    assert "no measurements" in fails(1, "report", tiny_artifact, "--measured", empty)


def test_a_damaged_artifact_is_refused(tiny_artifact, fails, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_artifact, copy)
    raw = bytearray((copy / "ladder.json").read_bytes())
    raw[len(raw) // 2] ^= 1
    (copy / "ladder.json").write_bytes(raw)
    for verb in (["run", copy, "hello"], ["inspect", copy], ["report", copy]):
        assert "ladder.json" in fails(6, *verb)
    (copy / "ladder.json").write_bytes((tiny_artifact / "ladder.json").read_bytes())
    shard = copy / "block-00000.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    assert shard.name in fails(6, "inspect", copy, "--verify")


# On the bundled model


@pytest.mark.real
def test_every_verb_on_the_bundled_model(artifact, text_file, call, ask, monkeypatch, tmp_path):
    monkeypatch.setattr(table, "bandwidth", lambda: Bandwidth("test", 1e9))
    preview = ask("fit", "smollm2", "--memory", "128MiB", "--dry-run")
    assert keys(preview["breakdown"]) == preview["budget_bytes"] == 2**27
    assert 0.97 * 2**27 <= preview["planned_bytes"] <= 2**27
    assert ask("plan", "smollm2", "--memory", "128MiB")["rows"][-1]["fits"]
    seen = ask("inspect", artifact, "--memory", "190MiB", "--verify")
    assert 0.97 * 190 * 2**20 <= seen["planned_bytes"] <= 190 * 2**20
    status, out, err = call(
        "run", artifact, "What is the capital of France?", "--memory", "200MiB",
        "--max-new-tokens", 8,
    )  # fmt: skip
    assert status == 0
    assert "Paris" in out
    assert "tokens/s" in err
    found = ask("run", artifact, "One, two, three,", "--raw", "--weights", "140MB",
                "--max-new-tokens", 2)  # fmt: skip
    assert "four" in found["text"]
    assert found["weight_bytes"] <= 140_000_000
    line = ["measure", artifact, "--against", "smollm2", "--text", text_file, "--limit", 2]
    found = ask(*line, "--window", 64, "--no-speed", "--weights", "100MiB")
    assert found["kl"] < 0.5
    report = ask("report", artifact, "-o", tmp_path / "report")
    assert (tmp_path / "report" / "report.html").exists()
    assert len(report["files"]) == 6


@pytest.mark.real
def test_a_conversation_is_resized_while_it_runs(artifact, call, monkeypatch):
    lines = [
        "What is the capital of France? Answer in one word.", "/memory 190MiB", "/memory 1KiB",
        "/weights", "/reset", "/what", "", "Say hello.", "/quit", "never read",
    ]  # fmt: skip
    line = ["chat", artifact, "--memory", "200MiB", "--max-new-tokens", 6]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    status, out, err = call(*line)
    assert status == 0
    assert "Paris" in out
    assert len(out.strip().splitlines()) == 2
    assert err.count("in all") == 2
    assert "smallest total" in err
    assert "forgotten" in err
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is the capital of France?\n"))
    status, out, err = call(*line, "--json")
    found = json.loads(out)
    assert [m["role"] for m in found["messages"]] == ["user", "assistant"]
    assert "Paris" in found["messages"][1]["content"]
