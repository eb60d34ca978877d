"""Keys, limits, the budget, metrics and CORS of a live server."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from pliant.serve import gate
from pliant.serve.gate import Limits

from .conftest import eventually, serving
from .scripted import ScriptedEngine

ASKED = {"prompt": "hi", "max_tokens": 5}


@pytest.fixture
def http(scripted_url, scripted):
    with httpx.Client(base_url=scripted_url, timeout=20) as client:
        yield client


def error_of(response: httpx.Response) -> dict:
    """The error object, which must have OpenAI's shape."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


def test_it_is_healthy(http):
    assert http.get("/health").json() == {"status": "ok"}


def test_the_budget_is_told_and_moved(http):
    before = http.get("/v1/budget").json()
    told = {"memory": 100, "planned": 80, "weights": 50, "cache": 30, "waiting": 0, "running": 0}
    assert told.items() <= before.items()
    assert (before["damage"], before["pages"], before["moves"]) == (None, {}, 0)
    assert http.put("/v1/budget", json={"memory": "1KiB"}).json()["memory"] == 1024
    assert http.put("/v1/budget", json={"memory": 2048}).json()["memory"] == 2048
    for wrong in (5, "much", -1, "9 bananas", 10**400, "9" * 400, None, [1], True):
        refused = http.put("/v1/budget", json={"memory": wrong})
        assert refused.status_code == 400
        assert error_of(refused)["param"] == "memory"
    assert http.get("/v1/budget").json()["memory"] == 2048


def test_weights_and_decisions_are_told(http):
    assert http.get("/v1/ladder").json() == [
        {"name": "one", "kind": "q", "layer": 0, "rung": 1, "rungs": 3, "nbytes": 10, "most": 30}
    ]
    (made,) = http.get("/v1/decisions").json()
    assert (made["id"], made["what"], made["reason"]) == (1, "budget to 1 KiB", "a test")
    assert http.get("/v1/decisions?since=1").json() == []
    assert http.get("/v1/decisions?since=-1").status_code == 400


def test_the_page_is_whole_and_asks_nobody_else(http):
    page = http.get("/")
    assert page.status_code == 200
    assert "default-src 'self'" in page.headers["content-security-policy"]
    for name in ("dashboard.css", "dashboard.js"):
        assert f'"/{name}"' in page.text
        part = http.get(f"/{name}")
        assert part.status_code == 200
        assert "http" not in part.text.replace("https://", "http")
        same = http.get(f"/{name}", headers={"if-none-match": part.headers["etag"]})
        assert (same.status_code, same.content) == (304, b"")
    assert "//" not in page.text.replace("<!doctype", "")


def test_metrics_follow_what_happens(http, scripted):
    def sample(name, **labels):
        families = text_string_to_metric_families(http.get("/metrics").text)
        found = [
            s.value for f in families for s in f.samples if s.name == name and s.labels == labels
        ]
        return found[0] if found else 0

    count = {"name": "pliant_http_requests_total", "path": "/v1/completions"}
    good, bad = (sample(**count, status=status) for status in ("200", "400"))
    first = sample("pliant_first_event_seconds_count")
    http.post("/v1/completions", json=ASKED)
    http.post("/v1/completions", json={})
    assert sample(**count, status="200") == good + 1
    assert sample(**count, status="400") == bad + 1
    assert sample("pliant_first_event_seconds_count") == first + 1
    assert sample("pliant_budget_bytes") == 100
    assert sample("pliant_weight_bytes") == 50
    assert sample("pliant_requests_running") == 0


def test_whoever_has_a_key_gets_in():
    limits = Limits(keys=("first", "zweiß"))
    with serving(ScriptedEngine(), limits=limits) as url, httpx.Client(base_url=url) as http:
        for key in ("first", "zweiß"):
            headers = {"authorization": f"Bearer {key}".encode()}
            assert http.post("/v1/completions", json=ASKED, headers=headers).status_code == 200
        for wrong in (b"", b"Bearer wrong", b"Basic first", b"Bearer", b"Bearer \xff"):
            headers = {"authorization": wrong} if wrong else {}
            for path in ("/v1/models", "/v1/budget", "/metrics", "/openapi.json", "/nowhere"):
                refused = http.get(path, headers=headers)
                assert refused.status_code == 401
                assert error_of(refused)["code"] == "invalid_api_key"
        assert http.get("/health").status_code == 200


def test_requests_have_a_largest_size(http):
    huge = http.post("/v1/completions", json={"prompt": "x" * 10_000_000})
    assert huge.status_code == 413
    assert error_of(huge)["code"] == "request_too_large"

    def chunks():
        yield b'{"prompt": "'
        for _ in range(160):
            yield b"x" * 65536

    undeclared = http.post(
        "/v1/completions", content=chunks(), headers={"content-type": "application/json"}
    )
    assert undeclared.status_code == 413
    assert "4194304 bytes" in error_of(undeclared)["message"]


def test_a_huge_prompt_is_refused_where_the_size_is_allowed():
    with serving(ScriptedEngine(), limits=Limits(body=32 << 20)) as url:
        refused = httpx.post(f"{url}/v1/completions", json={"prompt": "x" * 10_000_000}, timeout=60)
    assert refused.status_code == 400
    assert error_of(refused)["code"] == "context_length_exceeded"


def test_answers_have_a_longest_time():
    engine = ScriptedEngine()
    engine.held = True
    with serving(engine, limits=Limits(seconds=0.2)) as url, httpx.Client(base_url=url) as http:
        late = http.post("/v1/completions", json=ASKED)
        assert late.status_code == 504
        assert error_of(late)["code"] == "timeout"
        stream = http.post("/v1/completions", json={**ASKED, "stream": True})
        assert stream.status_code == 200
        assert '"timeout"' in stream.text
        assert "[DONE]" not in stream.text
        eventually(lambda: len(engine.cancelled) == 2)


def test_requests_have_a_longest_time_to_arrive(monkeypatch):
    monkeypatch.setattr(gate, "GRACE_SECONDS", 0.0)
    with serving(ScriptedEngine(), limits=Limits(seconds=0.2)) as url:
        where = urlsplit(url)
        with socket.create_connection((where.hostname, where.port), timeout=30) as connection:
            head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            connection.sendall(head + b"content-length: 100\r\n\r\n{")
            said = connection.recv(65536)
    assert said.startswith(b"HTTP/1.1 504")


def test_a_full_queue_says_so(http, scripted):
    scripted.most = 2
    for more in ({}, {"stream": True}):
        refused = http.post("/v1/completions", json={"prompt": ["a", "b", "c"], **more})
        assert refused.status_code == 503
        assert error_of(refused)["message"] == "too many"
    eventually(lambda: scripted.status().running == 0)
    assert len(scripted.cancelled) == 4
    assert http.post("/v1/completions", json=ASKED).status_code == 200


def test_browsers_are_let_in_only_where_that_was_said(http):
    page = {"origin": "https://page.example", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in http.get("/health", headers=page).headers
    assert "access-control-allow-origin" not in http.options("/v1/models", headers=page).headers
    limits = Limits(keys=("key",))
    with serving(ScriptedEngine(), limits=limits, origins=["https://page.example"]) as url:
        allowed = httpx.options(f"{url}/v1/completions", headers=page).headers
        other = httpx.options(
            f"{url}/v1/completions", headers=page | {"origin": "https://b.example"}
        )
    assert allowed["access-control-allow-origin"] == "https://page.example"
    assert "access-control-allow-origin" not in other.headers


def test_unknown_pages_and_methods(http):
    assert error_of(http.get("/nowhere"))["type"] == "not_found_error"
    wrong = http.get("/v1/completions")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert error_of(wrong)["type"] == "invalid_request_error"
    for path in ("/docs", "/redoc"):  # their scripts are elsewhere
        assert http.get(path).status_code == 404


def test_a_stream_is_server_sent_events(http):
    stream = http.post("/v1/completions", json={**ASKED, "stream": True})
    assert stream.headers["content-type"].startswith("text/event-stream")
    assert stream.headers["cache-control"] == "no-cache"
    lines = stream.text.split("\n\n")
    assert all(line.startswith("data: {") for line in lines[:-2])
    assert lines[-2:] == ["data: [DONE]", ""]
    assert "usage" not in stream.text
