"""Answers keep to their grammar whatever the model would say, in both engines, and end with it."""

from __future__ import annotations

import asyncio
import json
import random
import re
import sys
from contextlib import suppress

import jsonschema_rs
import openai
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pliant.run import Sampler, load
from pliant.serve import grammar as module
from pliant.serve.batching import BatchingEngine
from pliant.serve.grammar import Course, Grammar, GrammarError, Grammars
from pliant.serve.request import Live, Piece, Request
from pliant.serve.sequential import SequentialEngine

from .conftest import serving

PROMPT = tuple(range(20, 60))
MESSAGES = [{"role": "user", "content": "hello"}]
END = 2
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "dög"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
SCHEMAS = {
    "person": PERSON,
    "numbers": {
        "type": "array",
        "items": {"type": "number", "maximum": 99.5},
        "minItems": 1,
        "maxItems": 3,
    },
    "either": {"anyOf": [{"const": {"a": [1, None]}}, {"type": "boolean"}]},
    "pattern": {"type": "string", "pattern": "^[0-9]{3}-[a-f]{2}$"},
    "reference": {
        "$defs": {"leaf": {"enum": [1, 2]}},
        "type": "array",
        "prefixItems": [{"$ref": "#/$defs/leaf"}, {"type": "null"}],
        "items": False,
        "minItems": 2,
    },
}


@pytest.fixture(scope="module")
def many(artifact):
    return load(artifact, weights=120_000, context=200, batch=8)


@pytest.fixture(scope="module")
def tokenizer(model):
    return model.artifact.tokenizer()


@pytest.fixture(scope="module")
def grammars(tokenizer):
    return Grammars(tokenizer, frozenset({END}))


@pytest.fixture(scope="module", params=[SequentialEngine, BatchingEngine])
def client(request, many, tokenizer):
    """OpenAI's client of a server with a random model."""
    with serving(request.param(many, tokenizer)) as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def allowed(course: Course, vocabulary: int = 300) -> set[int]:
    found = course.mask(torch.zeros(vocabulary))
    assert found.shape == (vocabulary,)
    return set(torch.isfinite(found).nonzero()[:, 0].tolist())


def tokens(tokenizer, text: str) -> list[int]:
    return tokenizer(text)["input_ids"]


def schema_format(schema) -> dict:
    return {
        "type": "json_schema",
        "json_schema": {"name": "it", "schema": schema, "strict": True},
    }


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_a_random_model_answers_by_the_schema(client, schema):
    found = client.chat.completions.create(
        model="tiny", messages=MESSAGES, response_format=schema_format(schema), n=4, seed=3
    )
    for choice in found.choices:
        assert choice.finish_reason == "stop"
        jsonschema_rs.validate(schema, json.loads(choice.message.content))


def test_an_answer_streams(client):
    asked = {"model": "tiny", "seed": 1, "messages": MESSAGES}
    asked["response_format"] = schema_format(PERSON)
    whole = client.chat.completions.create(**asked).choices[0].message.content
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, stream=True)]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == whole
    assert chunks[-1].finish_reason == "stop"
    jsonschema_rs.validate(PERSON, json.loads(whole))


def test_completions_have_grammars_too(client):
    asked = {"model": "tiny", "prompt": "hello", "max_tokens": 60, "seed": 1}
    for extra, pattern in (
        ({"guided_regex": "(ab|c){2}[0-9]"}, "(ab|c){2}[0-9]"),
        ({"guided_choice": ["yes", 'n"\no', "é|"]}, 'yes|n"\no|é\\|'),
        ({"response_format": schema_format(SCHEMAS["pattern"])}, '"[0-9]{3}-[a-f]{2}"'),
    ):
        choice = client.completions.create(**asked, extra_body=extra).choices[0]
        assert re.fullmatch(pattern, choice.text)
        assert choice.finish_reason == "stop"


def test_any_object_is_one(client):
    """Greedy, for a random model's greedy object need not end."""
    whole = client.chat.completions.create(
        model="tiny", messages=MESSAGES, response_format={"type": "json_object"}, temperature=0,
        max_tokens=50,
    ).choices[0]  # fmt: skip
    assert whole.message.content.startswith("{")
    if whole.finish_reason == "stop":
        assert isinstance(json.loads(whole.message.content), dict)


def test_max_tokens_cuts_an_answer_short(client):
    asked = {"model": "tiny", "messages": MESSAGES, "response_format": schema_format(PERSON)}
    cut = client.chat.completions.create(**asked, max_tokens=5).choices[0]
    assert (cut.message.content[:1], cut.finish_reason) == ("{", "length")


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "thing"}, "thing"),
        ({"not": {"type": "string"}}, '"not"'),
        ({"type": "string", "pattern": "(a"}, "unclosed group"),
        ({"$ref": "http://example.com/schema"}, "does not fetch"),
        ({"allOf": [{"type": "string"}, {"type": "number"}]}, "Unsatisfiable"),
        ({"enum": ["x" * 300_000]}, "262144"),
    ],
)
def test_a_schema_that_cannot_be_followed_is_refused(client, schema, words):
    with pytest.raises(openai.BadRequestError, match=words) as caught:
        client.chat.completions.create(
            model="tiny", messages=MESSAGES, response_format=schema_format(schema)
        )
    assert (caught.value.param, caught.value.code) == ("response_format", "invalid_grammar")
    assert len(str(caught.value)) < 800


def test_without_the_library_it_says_what_to_install(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance.hf", None)
    with pytest.raises(GrammarError, match=r"pip install 'pliant\[serve\]'"):
        Grammars(tokenizer, frozenset({END})).json({})


def test_a_request_without_a_grammar_never_meets_one(many, tokenizer, monkeypatch):
    def failing(*args):
        raise AssertionError("called")

    for kind, name in ((Grammars, "_compile"), (Grammar, "start"), (Course, "mask"),
                       (Course, "commit")):  # fmt: skip
        monkeypatch.setattr(kind, name, failing)
    with serving(SequentialEngine(many, tokenizer)) as url:
        fresh = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        for form in ({}, {"response_format": {"type": "text"}}):
            answer = fresh.chat.completions.create(
                model="tiny", messages=MESSAGES, max_tokens=3, **form
            )
            assert answer.usage.completion_tokens == 3


def test_the_end_is_allowed_exactly_where_the_grammar_may_stop(grammars, tokenizer):
    course = grammars.json({"type": "integer", "minimum": 1}).start()
    digits = set(tokens(tokenizer, "0123456789"))
    assert allowed(course) == digits - set(tokens(tokenizer, "0"))
    course.commit(*tokens(tokenizer, "7"))
    assert allowed(course) == {END, *digits}
    assert not course.over
    one = grammars.choice(["ab"]).start()
    for token in tokens(tokenizer, "ab"):
        assert not one.over
        assert allowed(one) == {token}
        one.commit(token)
    assert one.over


def test_no_special_token_is_text(grammars, tokenizer):
    course = grammars.regex(".*").start()
    assert allowed(course).isdisjoint({0, 1, 3})
    for token in tokens(tokenizer, "<turn>"[:-1]):
        course.commit(token)
    assert 3 not in allowed(course)


def test_a_models_vocabulary_can_be_wider_or_narrower(grammars, tokenizer):
    course = grammars.regex("[a-z]").start()
    letters = set(tokens(tokenizer, "abcdefghijklmnopqrstuvwxyz"))
    assert allowed(course, 1000) == letters
    assert allowed(course, 100) == {letter for letter in letters if letter < 100}


def test_blanks_are_few(grammars, tokenizer):
    course = grammars.json({"type": "object"}).start()
    for token in tokens(tokenizer, "{\n" + " " * 40):
        course.commit(token)
    assert allowed(course).isdisjoint(tokens(tokenizer, " \n\t"))


def test_answers_of_one_grammar_do_not_meet(grammars, tokenizer):
    compiled = grammars.choice(["ab", "cd"])
    first, second = compiled.start(), compiled.start()
    first.commit(*tokens(tokenizer, "a"))
    assert allowed(first) == set(tokens(tokenizer, "b"))
    assert allowed(second) == set(tokens(tokenizer, "ac"))
    assert grammars.choice(["ab", "cd"]) is compiled


def test_a_token_beside_the_grammar_is_an_error(grammars, tokenizer):
    course = grammars.choice(["ab"]).start()
    with pytest.raises(GrammarError, match="cannot be followed"):
        course.commit(*tokens(tokenizer, "b"))


def test_a_grammar_that_takes_too_long_is_an_error(tokenizer, monkeypatch):
    monkeypatch.setitem(module.LIMITS, "max_lexer_states", 300)
    course = Grammars(tokenizer, frozenset({END})).regex("(.*a.{12}b)*").start()
    text = "".join(random.Random(0).choices("ab", k=300))

    def follow() -> None:
        for token in tokens(tokenizer, text):
            course.mask(torch.zeros(300))
            course.commit(token)

    with pytest.raises(GrammarError, match="too many states"):
        follow()


def test_logprobs_are_the_models_own(grammars, tokenizer):
    logits = torch.zeros(300)
    logits[70], want = 5.0, tokens(tokenizer, "ab")[0]
    request = Request((5,), 9, logprobs=1, grammar=grammars.choice(["ab"]))
    live = Live(request, tokenizer, frozenset({END}))
    chosen, piece = live.next(logits)
    score = torch.log_softmax(logits, -1)
    assert chosen == want
    assert piece.tokens[0].logprob == pytest.approx(float(score[want]))
    assert piece.tokens[0].likeliest[0][1] == pytest.approx(float(score[70]))
    assert logits[70] == 5.0


def test_it_ends_without_waiting_for_an_end_token(grammars, tokenizer):
    request = Request((5,), 2, grammar=grammars.choice(["ab"]))
    live = Live(request, tokenizer, frozenset({END}))
    said = [live.next(torch.zeros(300))[1].text for _ in "ab"]
    assert (said, live.reason, live.made) == (["a", "b"], "stop", 2)


def test_whoever_gives_way_keeps_its_place(many, tokenizer):
    """Answers where pages run short are those where they do not."""
    compiled = Grammars(tokenizer, frozenset({END})).json(PERSON)
    asked = [
        Request(PROMPT[: 10 + i], 100, Sampler(temperature=1.0, seed=i), grammar=compiled)
        for i in range(8)
    ]

    async def answers(pages: int | None):
        engine, gone = BatchingEngine(many, tokenizer), []
        if pages is not None:
            engine.pool.budget = pages * engine.pool.shape.nbytes()
        give_way = engine._give_way
        engine._give_way = lambda error: (gone.append(error), give_way(error))

        async def said(answer) -> str:
            return "".join([e.text async for e in answer if isinstance(e, Piece)])

        try:
            return await asyncio.gather(*[said(engine.submit(r)) for r in asked]), len(gone)
        finally:
            await engine.close()

    short, gone = asyncio.run(answers(16))
    plenty, _ = asyncio.run(answers(None))
    assert gone
    assert short == plenty
    for text in short:
        jsonschema_rs.validate(PERSON, json.loads(text))


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["type", "properties", "items", "enum", "pattern", "$ref", "minimum", "x"]
            ),
            inner | st.sampled_from(["object", "string", "number", "array", "#", "[a-z"]),
            max_size=4,
        )
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(["type", "anyOf", "items", "properties"]), JSON) | JSON)
def test_whatever_is_sent_as_a_schema_is_followed_or_refused(grammars, schema):
    with suppress(GrammarError):
        grammars.json(schema).start().mask(torch.zeros(300))


@settings(max_examples=100, deadline=None)
@given(st.text(), st.lists(st.text(), min_size=1, max_size=4))
def test_whatever_is_sent_as_a_pattern_or_a_choice_is_followed_or_refused(grammars, pattern, texts):
    for make, what in ((grammars.regex, pattern), (grammars.choice, texts)):
        with suppress(GrammarError):
            make(what).start().mask(torch.zeros(300))
