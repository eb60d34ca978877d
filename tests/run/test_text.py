"""Streamed text is the decoded answer, never half a character."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pliant.run.text import TextStream

from .tiny import ByteTokenizer


def run(text: str, stop=()):
    tokenizer = ByteTokenizer()
    stream = TextStream(tokenizer, stop)
    pieces = []
    for token in tokenizer.tokens(text):
        pieces.append(stream.push(token))
        if stream.stopped:
            return pieces
    pieces.append(stream.finish())
    return pieces


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_pieces_join_to_the_text(text):
    pieces = run(text)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text


@settings(max_examples=200, deadline=None)
@given(st.text("ab\n"), st.lists(st.text("ab\n", min_size=1, max_size=3), max_size=2))
def test_text_ends_before_the_stop_string_that_is_complete_first(text, stop):
    places = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    expected = text[: min(places)[1]] if places else text
    assert "".join(run(text, stop)) == expected


def test_text_comes_as_soon_as_it_can():
    assert run("hé!") == ["h", "", "é", "!", ""]
    assert run("ab\nc", ["\nUser"]) == ["a", "b", "", "\nc", ""]


def test_a_broken_character_at_the_end_is_shown():
    stream = TextStream(ByteTokenizer())
    assert stream.push(4 + 0xC3) == ""
    assert stream.finish() == "\ufffd"


@pytest.mark.parametrize("stop", [[], [""]])
def test_empty_stop_strings_stop_nothing(stop):
    assert "".join(run("abc", stop)) == "abc"
