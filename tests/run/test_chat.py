"""A chat remembers both sides and stays inside its context."""

from __future__ import annotations

import pytest

from pliant.errors import PliantError
from pliant.run import Chat, stream

from .tiny import ByteTokenizer, ChatTokenizer


def test_turns_join_the_history_and_are_answered_in_it(model):
    tokenizer = ChatTokenizer()
    chat = Chat(model, tokenizer, system="be brief", max_new_tokens=10)
    first = "".join(chat.send("hello"))
    assert [m["role"] for m in chat.history] == ["user", "assistant"]
    second = "".join(chat.send("more"))
    said = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "more"},
    ]
    assert second == "".join(stream(model, tokenizer, said, max_new_tokens=10))
    chat.clear()
    assert chat.history == []


def test_the_oldest_turns_go_when_the_context_is_full(model):
    chat = Chat(model, ChatTokenizer(), system="s", context=120, max_new_tokens=20)
    for number in range(8):
        "".join(chat.send(f"message {number} " + "x" * 20))
        assert chat.usage.prompt_tokens + 20 <= 120
        assert chat.history[-2]["content"].startswith(f"message {number}")
        assert chat.history[0]["role"] == "user"


def test_a_message_that_is_too_long_is_refused_and_forgotten(model):
    chat = Chat(model, ChatTokenizer(), context=100, max_new_tokens=20)
    "".join(chat.send("hello"))
    with pytest.raises(PliantError, match="only 80 fit"):
        chat.send("x" * 90)
    "".join(chat.send("hello"))


def test_an_answer_that_is_broken_off_stays_as_far_as_it_got(model):
    chat = Chat(model, ChatTokenizer(), max_new_tokens=30)
    pieces = chat.send("hello")
    first = next(pieces)
    pieces.close()
    assert chat.history[-1] == {"role": "assistant", "content": first}


def test_a_model_without_a_template_cannot_chat(model):
    with pytest.raises(PliantError, match="chat template"):
        Chat(model, ByteTokenizer())
