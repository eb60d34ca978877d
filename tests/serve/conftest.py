"""A scripted engine, a tiny random artifact, and servers on free loopback ports."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import contextmanager

import pytest
import uvicorn
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pliant.run import load
from pliant.serve.http import create_app
from pliant.serve.server import listen, url_of

from ..ladder.tiny import write_artifact
from .scripted import ScriptedEngine

TEMPLATE = (
    "{% for m in messages %}<turn>{{ m.role }}:{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant:{% endif %}"
)


@contextmanager
def serving(engine, buffer: int = 0, **options):
    """A live server of `engine`: its URL. buffer: bytes that a connection takes, 0 for many."""
    listening = listen("127.0.0.1", 0)
    if buffer:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
    config = uvicorn.Config(create_app(engine, "tiny", **options), log_config=None)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    try:
        yield url_of(listening)
    finally:
        server.should_exit = True
        thread.join(20)


def eventually(holds) -> None:
    """Wait until `holds()`; fail when it never does."""
    for _ in range(2000):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError("it never came true")


_shared = ScriptedEngine()


@pytest.fixture(scope="session")
def scripted_url():
    """A live server that the tests here share."""
    with serving(_shared) as url:
        yield url


@pytest.fixture
def scripted(scripted_url):
    """The engine behind `scripted_url`, as new."""
    _shared.reset()
    return _shared


@pytest.fixture(scope="session")
def artifact(tmp_path_factory):
    """A random Llama of two layers with a tokenizer of bytes."""
    directory = write_artifact(tmp_path_factory.mktemp("serve") / "tiny")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = {"<pad>": 0, "<s>": 1, "</s>": 2, "<turn>": 3}
    plain = Tokenizer(models.BPE({**special, **{c: 4 + i for i, c in enumerate(letters)}}, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain.decoder = decoders.ByteLevel()
    plain.add_special_tokens([AddedToken(text, special=True) for text in special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def model(artifact):
    return load(artifact, weights=120_000, context=200, batch=1)
