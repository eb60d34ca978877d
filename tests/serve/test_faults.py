"""Broken requests, clients that go, and many at once: clear errors, nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import socket
from urllib.parse import urlsplit

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode

from pliant.serve.sequential import SequentialEngine

from .conftest import eventually, serving
from .scripted import TEXT, ScriptedEngine

JSON = {"content-type": "application/json"}
ASKED = {"prompt": "hi", "max_tokens": 99}
LONG = {"prompt": "hi", "max_tokens": 4000, "stream": True}

MALFORMED = {
    "nothing": b"",
    "half an object": b'{"prompt": "hi"',
    "words": b"hello",
    "a list": b"[1]",
    "null": b"null",
    "a number": b"7",
    "deeply nested": b'{"prompt": ' + b"[" * 100_000,
    "a huge number": b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
    "not a number": b'{"prompt": "x", "temperature": NaN}',
    "infinity": b'{"prompt": "x", "presence_penalty": -Infinity}',
    "half a surrogate pair": b'{"prompt": "\\ud800"}',
    "broken UTF-8": b'{"prompt": "\xff\xfe"}',
    "a name that is no text": b'{"prompt": "x", "logit_bias": {"\\udfff": "y"}}',
    "wrong type": b'{"prompt": {"a": 1}}',
    "mixed prompts": b'{"prompt": ["a", [1]]}',
    "a zero byte": b'{"prompt": "x"}\x00',
}


@pytest.fixture
def http(scripted_url, scripted):
    with httpx.Client(base_url=scripted_url, timeout=60) as client:
        yield client


@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_malformed_bodies_get_an_error(http, scripted, path, body):
    response = http.post(path, content=body, headers=JSON)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert scripted.requests == []
    assert http.post("/v1/completions", json=ASKED).status_code == 200


def test_surrogates_in_a_chat_get_an_error(http):
    body = b'{"messages": [{"role": "user", "content": "\\udfff"}]}'
    assert http.post("/v1/chat/completions", content=body, headers=JSON).status_code == 400


def test_only_json_is_taken(http):
    body = json.dumps(ASKED)
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        sent = http.post("/v1/completions", content=body, headers={"content-type": kind})
        assert sent.status_code == 400


def test_a_template_that_fails_is_a_mistake_of_the_request(http, scripted, monkeypatch):
    def failing(*args, **options):
        raise RuntimeError("roles must alternate")

    monkeypatch.setattr(scripted.tokenizer, "apply_chat_template", failing)
    sent = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]})
    assert sent.status_code == 400
    assert "roles must alternate" in sent.json()["error"]["message"]


def test_a_model_without_a_template_does_not_chat(http, scripted, monkeypatch):
    monkeypatch.setattr(scripted.tokenizer, "chat_template", None, raising=False)
    sent = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]})
    assert sent.status_code == 400
    assert "/v1/completions" in sent.json()["error"]["message"]


def test_an_unforeseen_failure_tells_nothing_of_the_inside(http, scripted, monkeypatch):
    def failing(request):
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(scripted, "submit", failing)
    sent = http.post("/v1/completions", json=ASKED)
    assert sent.status_code == 500
    assert "secret" not in sent.text
    assert sent.json()["error"]["type"] == "server_error"


def connect(url: str, body: dict, buffer: int = 0) -> socket.socket:
    """A connection on which a completion was asked for; it holds `buffer` bytes unread, or many."""
    where, content = urlsplit(url), json.dumps(body).encode()
    made = socket.socket()
    if buffer:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    made.connect((where.hostname, where.port))
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    made.sendall(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
    return made


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("leave", ["close", "half"])
def test_a_client_that_goes_cancels(scripted_url, scripted, stream, leave):
    scripted.held = True
    connection = connect(scripted_url, {**ASKED, "stream": stream})
    eventually(lambda: scripted.requests)
    if stream:
        assert connection.recv(12) == b"HTTP/1.1 200"
    if leave == "close":
        connection.close()
    else:
        connection.shutdown(socket.SHUT_WR)
    eventually(lambda: scripted.cancelled == scripted.requests)
    connection.close()
    assert scripted.status().running == 0


def test_a_client_that_goes_frees_the_real_engine(model):
    engine = SequentialEngine(model, model.artifact.tokenizer())
    asked = {"prompt": ["abc"] * 100, "max_tokens": 190, "temperature": 0, "stream": True}
    with serving(engine) as url:
        connection = connect(url, asked)
        eventually(lambda: engine.status().waiting)
        connection.close()
        eventually(lambda: engine.status().running + engine.status().waiting == 0)
        assert engine.status().new_tokens < 100 * 190
        one = asked | {"prompt": "abc", "max_tokens": 2, "stream": False}
        sent = httpx.post(f"{url}/v1/completions", json=one, timeout=30)
        assert sent.json()["usage"]["completion_tokens"] == 2


def test_an_unfinished_request_is_let_go(scripted_url, scripted):
    where = urlsplit(scripted_url)
    for part in (b"POST /v1/comp", b"POST /v1/completions HTTP/1.1\r\ncontent-length: 50\r\n\r\n{"):
        with socket.create_connection((where.hostname, where.port)) as connection:
            connection.sendall(part)
    assert httpx.get(f"{scripted_url}/health").status_code == 200
    assert scripted.requests == []


def test_200_connections_and_slow_readers(scripted_url, scripted):
    scripted.text = TEXT * 3

    async def read(client: httpx.AsyncClient, slow: bool) -> str:
        text = ""
        async with client.stream("POST", "/v1/completions", json=LONG) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
                    if slow and len(text) % 20 == 0:
                        await asyncio.sleep(0.05)
        return text

    async def everyone() -> list[str]:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(base_url=scripted_url, timeout=60, limits=limits) as client:
            return await asyncio.gather(*(read(client, slow=i % 4 == 0) for i in range(200)))

    assert set(asyncio.run(everyone())) == {scripted.text}
    assert len(scripted.requests) == 200
    assert scripted.cancelled == []


def test_readers_that_stop_reading_hold_up_nobody():
    engine = ScriptedEngine()
    engine.text = TEXT * 50
    with serving(engine, buffer=4096) as url:  # of one connection; a stream here has 150 kB
        stuck = [connect(url, LONG, buffer=4096) for _ in range(20)]
        eventually(lambda: len(engine.requests) == 20 and engine.status().running == 0)
        sent = httpx.post(f"{url}/v1/completions", json=LONG | {"stream": False}, timeout=30)
        assert sent.json()["choices"][0]["text"] == engine.text
        with stuck.pop() as connection:  # what waited for its reader is all there
            connection.settimeout(30)
            text = b""
            while b"[DONE]" not in text:
                text += connection.recv(65536)
        chunks = [json.loads(line[6:]) for line in text.split(b"\r\n") if line[:7] == b"data: {"]
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == engine.text
        for connection in stuck:
            connection.close()


@pytest.fixture(scope="module")
def operations(scripted_url):
    """What the server's own OpenAPI description lists, by path and method."""
    schema = schemathesis.openapi.from_url(f"{scripted_url}/openapi.json")
    found = [operation.ok() for operation in schema.get_all_operations()]
    return {(operation.path, operation.method.upper()): operation for operation in found}


def test_the_description_lists_every_page(operations):
    assert set(operations) == {
        ("/v1/completions", "POST"), ("/v1/chat/completions", "POST"), ("/v1/models", "GET"),
        ("/v1/models/{model}", "GET"), ("/v1/budget", "GET"), ("/v1/budget", "PUT"),
        ("/v1/ladder", "GET"), ("/v1/decisions", "GET"),
        ("/health", "GET"), ("/metrics", "GET"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("path", "method", "count"),
    [
        ("/v1/completions", "POST", 60),
        ("/v1/chat/completions", "POST", 60),
        ("/v1/budget", "PUT", 20),
    ],
)
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_no_request_of_its_own_description_breaks_it(
    operations, scripted_url, path, method, count, mode
):
    seen = set()

    @settings(max_examples=count, deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(operations[path, method].as_strategy(generation_mode=mode))
    def call(case):
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = "tiny"
        response = case.call(base_url=scripted_url, timeout=30)
        assert response.status_code < 500, (case.body, response.text)
        seen.add(response.status_code)

    call()
    assert (200 if mode is GenerationMode.POSITIVE else 400) in seen
