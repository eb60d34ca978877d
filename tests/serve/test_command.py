"""`pliant serve` from outside: what it prints, its mistakes, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager

import httpx
import pytest

from pliant.cli import main
from pliant.cli import serve as command

from .conftest import eventually

SCRIPTED = """
import sys
from pliant.serve.http import create_app
from pliant.serve.server import listen, serve, url_of
from tests.serve.scripted import ScriptedEngine

engine = ScriptedEngine()
engine.held = True
listening = listen("127.0.0.1", 0)
print('{"url": "%s"}' % url_of(listening), flush=True)
serve(create_app(engine, "tiny"), listening, drain_seconds=1)
"""


@contextmanager
def started(*arguments):
    """A server in a process of its own, and what it printed about itself."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(["src", "."])}
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        # Who runs the tests in the background may have them ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        yield process, json.loads(line)
    finally:
        process.kill()
        process.communicate()


def refuses(url: str) -> bool:
    """Whether nobody listens there any more."""
    try:
        httpx.get(f"{url}/health", timeout=5)
    except httpx.ConnectError:
        return True
    return False


def test_sigterm_finishes_what_runs(artifact):
    line = ["-m", "pliant", "serve", artifact, "--weights", 120_000, "--context", 200, "--port", 0,
            "--name", "mine", "--api-key", "one", "--api-key", "two", "--json"]  # fmt: skip
    asked = {"model": "mine", "prompt": ["abc"] * 6, "max_tokens": 190, "temperature": 0,
             "stream": True}  # fmt: skip
    with started(*line) as (process, said):
        assert (said["name"], said["context"]) == ("mine", 200)
        assert said["weight_bytes"] <= 120_000 < said["planned_bytes"]
        assert said["url"].startswith("http://127.0.0.1:")
        assert httpx.get(f"{said['url']}/v1/models").status_code == 401
        headers = {"authorization": "Bearer two"}
        url = f"{said['url']}/v1/completions"
        with httpx.stream("POST", url, json=asked, headers=headers, timeout=60) as stream:
            lines = stream.iter_lines()
            events = [next(lines)[6:]]
            process.send_signal(signal.SIGTERM)
            eventually(lambda: refuses(said["url"]))
            events += [line[6:] for line in lines if line]
        assert process.wait(30) == 0
        assert process.stderr.read() == ""
    ends = [json.loads(event)["choices"][0]["finish_reason"] for event in events[:-1]]
    assert events[-1] == "[DONE]"
    assert [end for end in ends if end] == ["length"] * 6


def test_sigterm_does_not_wait_for_ever():
    with started("-c", SCRIPTED) as (process, said):
        asked = {"prompt": "x", "stream": True}
        with httpx.stream(
            "POST", f"{said['url']}/v1/completions", json=asked, timeout=60
        ) as stream:
            next(stream.iter_bytes())
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0


def test_interrupting_is_interrupting(artifact):
    with started("-m", "pliant", "serve", artifact, "--port", 0, "--json") as (process, said):
        assert httpx.get(f"{said['url']}/health").status_code == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr.read().strip() == "interrupted"


@pytest.fixture
def fails(capsys):
    """Run `pliant serve` with what must fail with `status`; its one line on stderr."""

    def run(status, *arguments):
        found = main(["serve", *map(str, arguments)])
        said = capsys.readouterr()
        assert (found, said.out) == (status, ""), said.err
        assert said.err.startswith("error: ")
        return said.err

    return run


def test_mistakes_are_one_line(artifact, fails, tmp_path):
    assert "smallest total" in fails(5, artifact, "--port", 0, "--memory", "1KiB")
    assert "not a size" in fails(5, artifact, "--max-body", "large")
    assert "nowhere" in fails(1, tmp_path / "nowhere", "--port", 0)
    assert "65535" in fails(2, artifact, "--port", 70000)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen at 127.0.0.1 port {port}" in fails(1, artifact, "--port", port)
    assert "cannot listen" in fails(1, artifact, "--host", "256.1.1.1", "--port", 0)


def test_without_the_extra_it_says_what_to_install(artifact, fails, monkeypatch):
    absent = {"uvicorn", "prometheus_client"}
    real = command.find_spec
    monkeypatch.setattr(command, "find_spec", lambda name: None if name in absent else real(name))
    said = fails(1, artifact)
    assert "uvicorn, prometheus-client;" in said
    assert "pip install 'pliant[serve]'" in said


@pytest.mark.parametrize(
    ("host", "warned"), [("127.0.0.1", False), ("0.0.0.0", True), ("localhost", False)]
)
def test_an_open_address_without_a_key_is_warned_of(artifact, capsys, monkeypatch, host, warned):
    from pliant.serve import server

    monkeypatch.setattr(server, "serve", lambda app, listening: None)
    line = ["serve", str(artifact), "--port", "0", "--host", host]
    assert main(line) == 0
    said = capsys.readouterr().err
    assert "tiny: " in said
    assert "serving http://" in said
    assert ("warning: anyone" in said) == warned
    assert main([*line, "--api-key", "k"]) == 0
    assert "warning" not in capsys.readouterr().err
