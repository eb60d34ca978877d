"""Pieces join to the answer, end before a stop string, and never tell a part of one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pliant.errors import PliantError
from pliant.run.sampling import Sampler, Score
from pliant.serve.request import Live, Piece, Request

from ..run.tiny import ByteTokenizer

TOKENIZER = ByteTokenizer()
END = 2


def live(**options) -> Live:
    settings = {"max_tokens": 100, "logprobs": 0} | options
    return Live(Request((5, 6), **settings), TOKENIZER, frozenset({END}))


def run(text: str, **options) -> tuple[Live, list[Piece]]:
    """Push the bytes of `text`, then the end of text, as long as the request goes on."""
    made, pieces = live(**options), []
    for token in [*TOKENIZER.tokens(text), END]:
        pieces.append(made.push(Score(token, -1.0)))
        if made.reason:
            break
    return made, pieces


def join(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


@settings(max_examples=200, deadline=None)
@given(
    st.text("ab\né€", max_size=20), st.lists(st.text("ab\né", min_size=1, max_size=3), max_size=2)
)
def test_neither_text_nor_tokens_tell_of_a_stop_string(text, stop):
    made, pieces = run(text, stop=tuple(stop))
    places = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    expected = text[: min(places)[1]] if places else text
    assert join(pieces) == expected
    assert made.reason == "stop"
    given_text, ids = "", []
    for piece in pieces:
        given_text += piece.text
        ids += [token.id for token in piece.tokens if token.id != END]
        assert given_text.encode().startswith(bytes(i - 4 for i in ids))
    if not places:
        assert bytes(i - 4 for i in ids) == text.encode()


def test_a_token_waits_for_its_text():
    _, pieces = run("ab\nUx", stop=("\nUser",))
    assert [piece.text for piece in pieces] == ["a", "b", "", "", "\nUx", ""]
    assert [len(piece.tokens) for piece in pieces] == [1, 1, 0, 0, 3, 1]
    assert [token.offset for piece in pieces for token in piece.tokens] == [0, 1, 2, 3, 4, 5]


def test_parts_of_a_character_come_together():
    _, pieces = run("aé")
    assert [piece.text for piece in pieces] == ["a", "", "é", ""]
    assert [[token.text for token in piece.tokens] for piece in pieces] == [
        ["a"], [], ["\ufffd", "\ufffd"], [""],
    ]  # fmt: skip


def test_it_ends_for_a_reason():
    made, pieces = run("abcdef", max_tokens=3)
    assert (made.reason, made.made, join(pieces)) == ("length", 3, "abc")
    made, pieces = run("abc", max_tokens=3)
    assert (made.reason, join(pieces)) == ("length", "abc")
    made, pieces = run("ab", max_tokens=3)
    assert (made.reason, made.made, join(pieces)) == ("stop", 3, "ab")
    full = live()
    assert full.push(Score(70, -1.0), room=False).text == "B"
    assert full.reason == "length"


def test_what_is_held_back_comes_out_at_the_end():
    made, pieces = run("ab\n", stop=("\nUser",), max_tokens=3)
    assert (made.reason, join(pieces)) == ("length", "ab\n")
    made, pieces = run("ab\n", stop=("\nUser",))
    assert (made.reason, join(pieces)) == ("stop", "ab\n")
    broken = live(max_tokens=1)
    assert broken.push(Score(4 + 0xC3, -1.0)).text == "\ufffd"


def test_the_next_token_is_chosen_and_scored():
    logits = torch.zeros(260)
    logits[70], logits[71] = 5.0, 4.0
    made = live(logprobs=2)
    token, piece = made.next(logits)
    expected = torch.log_softmax(logits, -1)
    assert (token, piece.text) == (70, "B")
    assert piece.tokens[0].logprob == pytest.approx(float(expected[70]))
    assert [text for text, _ in piece.tokens[0].likeliest] == ["B", "C"]
    silent = live(logprobs=None).next(logits)[1]
    assert (silent.tokens[0].logprob, silent.tokens[0].likeliest) == (None, ())


def test_a_seed_gives_the_same_answer():
    def draw(seed):
        made = live(sampler=Sampler(temperature=1.0, seed=seed))
        return [made.next(torch.zeros(200))[0] for _ in range(20)]

    assert draw(3) == draw(3) != draw(4)


def test_the_last_event_counts():
    made, _ = run("abc")
    made.cached = 1
    end = made.finished("stop")
    assert (end.prompt_tokens, end.cached_tokens, end.new_tokens) == (2, 1, 4)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"prompt": ()}, "empty"), ({"max_tokens": -1}, "max_tokens"), ({"logprobs": -1}, "logprobs")],
)
def test_impossible_requests_are_refused(wrong, words):
    with pytest.raises(PliantError, match=words):
        Request(**({"prompt": (5,), "max_tokens": 4} | wrong))
