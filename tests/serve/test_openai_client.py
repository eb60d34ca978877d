"""OpenAI's own client against a live server: streams, logprobs, stop strings, usage, errors."""

from __future__ import annotations

import openai
import pytest

from pliant.run import Sampler, stream
from pliant.serve.sequential import SequentialEngine

from .conftest import serving
from .scripted import TEXT

MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def real_url(model):
    with serving(SequentialEngine(model, model.artifact.tokenizer())) as url:
        yield url


def client(url: str, **options) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, **options)


@pytest.fixture
def real(real_url):
    return client(real_url)


@pytest.fixture
def fake(scripted_url, scripted):
    return client(scripted_url)


def test_greedy_completions_are_pliants_own_text(real, model):
    tokenizer = model.artifact.tokenizer()
    expected = "".join(stream(model, tokenizer, "hello", max_new_tokens=24, raw=True))
    asked = {"model": "tiny", "prompt": "hello", "max_tokens": 24, "temperature": 0}
    whole = real.completions.create(**asked)
    assert whole.choices[0].text == expected
    pieces = [chunk.choices[0] for chunk in real.completions.create(**asked, stream=True)]
    assert "".join(piece.text for piece in pieces) == expected
    assert pieces[-1].finish_reason == whole.choices[0].finish_reason == "length"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (5, 24)
    assert whole.object == "text_completion"


def test_greedy_chat_is_pliants_own_text(real, model):
    tokenizer = model.artifact.tokenizer()
    expected = "".join(stream(model, tokenizer, MESSAGES, max_new_tokens=24))
    asked = {"model": "tiny", "messages": MESSAGES, "max_completion_tokens": 24, "temperature": 0}
    whole = real.chat.completions.create(**asked)
    assert whole.choices[0].message.content == expected
    assert whole.choices[0].message.role == "assistant"
    chunks = list(real.chat.completions.create(**asked, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == expected
    assert chunks[-1].choices[0].finish_reason == "length"
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_seed_repeats_an_answer(real):
    def ask(seed):
        asked = {"model": "tiny", "prompt": "hello", "max_tokens": 24, "seed": seed}
        return real.completions.create(**asked, extra_body={"top_k": 40}).choices[0].text

    assert ask(1) == ask(1) != ask(2)


def test_every_setting_reaches_the_engine(fake, scripted):
    fake.completions.create(
        model="tiny", prompt="hi", max_tokens=3, temperature=0.5, top_p=0.25, seed=9,
        stop=["a", "b"], logprobs=2, presence_penalty=0.5, frequency_penalty=-0.25,
        logit_bias={"7": -100, "9": 2.5},
        extra_body={"top_k": 7, "min_p": 0.125, "top_h": 0.75, "priority": -3, "unknown": {"x": 1}},
    )  # fmt: skip
    request = scripted.requests[0]
    sampler = request.sampler
    assert list(request.prompt) == scripted.tokenizer.tokens("hi")
    assert (sampler.temperature, sampler.top_p, sampler.seed) == (0.5, 0.25, 9)
    assert (sampler.top_k, sampler.min_p, sampler.top_h) == (7, 0.125, 0.75)
    assert (sampler.presence_penalty, sampler.frequency_penalty) == (0.5, -0.25)
    assert sampler.logit_bias == ((7, -100.0), (9, 2.5))
    assert (request.max_tokens, request.stop, request.logprobs) == (3, ("a", "b"), 2)
    assert request.priority == -3


def test_defaults_are_openais(fake, scripted):
    fake.completions.create(model="tiny", prompt="hi")
    fake.chat.completions.create(model="tiny", messages=MESSAGES)
    text, chat = scripted.requests
    assert (text.max_tokens, chat.max_tokens) == (16, scripted.context)
    assert text.sampler == chat.sampler == Sampler(temperature=1.0)
    assert text.grammar is chat.grammar is None
    assert text.logprobs is chat.logprobs is None
    assert list(chat.prompt) == scripted.tokenizer("<turn>u:hello<turn>a:")["input_ids"]


def test_stop_strings_never_show(fake):
    for stop in (["wör"], "wör", ["zzz", "wör"]):
        asked = {"model": "tiny", "prompt": "hi", "max_tokens": 99, "stop": stop}
        whole = fake.completions.create(**asked).choices[0]
        pieces = [c.choices[0] for c in fake.completions.create(**asked, stream=True, logprobs=1)]
        assert whole.text == "".join(piece.text for piece in pieces) == "Hello, "
        assert whole.finish_reason == pieces[-1].finish_reason == "stop"
        told = [t for piece in pieces if piece.logprobs for t in piece.logprobs.tokens]
        assert "".join(told) == "Hello, "


def test_logprobs_of_completions(fake):
    asked = {"model": "tiny", "prompt": "hi", "max_tokens": 4, "logprobs": 2}
    told = fake.completions.create(**asked).choices[0].logprobs
    assert told.tokens == list("Hell")
    assert told.token_logprobs == [-0.5] * 4
    assert told.top_logprobs[0] == {"H": -0.5, "I": -1.5}
    assert told.text_offset == [0, 1, 2, 3]
    pieces = [c.choices[0].logprobs for c in fake.completions.create(**asked, stream=True)]
    assert [t for piece in pieces if piece for t in piece.tokens] == list("Hell")


def test_an_echo_tells_the_prompts_logprobs(fake):
    asked = {"model": "tiny", "prompt": "abc", "max_tokens": 2, "logprobs": 1, "echo": True}
    choice = fake.completions.create(**asked).choices[0]
    assert choice.text == "abcHe"
    assert choice.logprobs.tokens == list("abcHe")
    assert choice.logprobs.token_logprobs == [None, *[-0.5] * 4]
    assert choice.logprobs.top_logprobs[0] is None
    assert choice.logprobs.text_offset == [0, 1, 2, 3, 4]
    pieces = [c.choices[0] for c in fake.completions.create(**asked, stream=True)]
    assert "".join(piece.text for piece in pieces) == "abcHe"
    plain = {"model": "tiny", "prompt": "abc", "max_tokens": 0, "echo": True}
    assert fake.completions.create(**plain).choices[0].text == "abc"
    ids = {"model": "tiny", "prompt": [4 + 104, 4 + 105], "max_tokens": 1, "echo": True}
    assert next(c.choices[0].text for c in fake.completions.create(**ids, stream=True)) == "hi"


def test_scores_of_a_prompt_are_the_models(real):
    asked = {"model": "tiny", "prompt": "hello there", "max_tokens": 1, "temperature": 0}
    told = real.completions.create(**asked, logprobs=1, echo=True).choices[0].logprobs
    assert len(told.tokens) == 12
    for logprob, top in zip(told.token_logprobs[1:], told.top_logprobs[1:], strict=True):
        assert logprob <= max(top.values()) <= 0


def test_logprobs_of_chat(fake):
    asked = {"model": "tiny", "messages": MESSAGES, "max_tokens": 9, "logprobs": True}
    content = fake.chat.completions.create(**asked, top_logprobs=2).choices[0].logprobs.content
    assert [token.token for token in content][:3] == ["H", "e", "l"]
    assert (content[0].logprob, content[0].bytes) == (-0.5, [72])
    assert [top.token for top in content[0].top_logprobs] == ["H", "I"]
    assert (content[-1].token, content[-1].bytes) == ("\ufffd", None)  # half of ö
    none = fake.chat.completions.create(**asked).choices[0].logprobs.content
    assert none[0].top_logprobs == []
    assert fake.chat.completions.create(model="tiny", messages=MESSAGES).choices[0].logprobs is None
    chunks = fake.chat.completions.create(**asked, stream=True)
    told = [c.choices[0].logprobs for c in chunks]
    assert [t.token for part in told if part for t in part.content] == [t.token for t in content]


def test_usage_of_a_stream(fake):
    asked = {"model": "tiny", "stream": True, "stream_options": {"include_usage": True}}
    for last in (
        list(fake.completions.create(prompt="hi", max_tokens=5, **asked))[-1],
        list(fake.chat.completions.create(messages=MESSAGES, max_tokens=5, **asked))[-1],
    ):
        assert last.choices == []
        assert last.usage.completion_tokens == 5
        assert last.usage.total_tokens == 5 + last.usage.prompt_tokens


def test_several_prompts_are_several_choices(fake, scripted):
    asked = {"model": "tiny", "prompt": ["one", "two", "three"], "max_tokens": 3}
    whole = fake.completions.create(**asked)
    assert [(c.index, c.text) for c in whole.choices] == [(0, "Hel"), (1, "Hel"), (2, "Hel")]
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (11, 9)
    texts = ["", "", ""]
    for chunk in fake.completions.create(**asked, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == ["Hel"] * 3
    fake.completions.create(model="tiny", prompt=[[70, 71], [72]])
    assert [request.prompt for request in scripted.requests[-2:]] == [(70, 71), (72,)]


def test_several_answers_to_a_prompt(fake, scripted):
    asked = {"model": "tiny", "prompt": ["one", "three"], "max_tokens": 3, "n": 2, "seed": 5}
    whole = fake.completions.create(**asked, best_of=2)
    assert [(c.index, c.text) for c in whole.choices] == [(i, "Hel") for i in range(4)]
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (8, 12)
    prompts = [scripted.tokenizer.tokens(text) for text in ("one", "one", "three", "three")]
    assert [list(request.prompt) for request in scripted.requests] == prompts
    assert [request.sampler.seed for request in scripted.requests] == [5, 6, 5, 6]
    chunks = list(
        fake.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert {c.choices[0].index for c in chunks[:-1]} == {0, 1, 2, 3}
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (8, 12)


def test_several_answers_to_a_chat(fake, scripted):
    asked = {"model": "tiny", "messages": MESSAGES, "max_tokens": 3, "n": 16}
    whole = fake.chat.completions.create(**asked)
    assert [(c.index, c.message.content) for c in whole.choices] == [(i, "Hel") for i in range(16)]
    prompt = len(scripted.requests[0].prompt)
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (prompt, 48)
    texts = [""] * 16
    for chunk in fake.chat.completions.create(**asked, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == ["Hel"] * 16


def test_parts_and_other_roles_of_messages(fake, scripted):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    fake.chat.completions.create(
        model="tiny",
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "assistant", "content": None},
            {"role": "user", "content": parts},
        ],
    )
    expected = scripted.tokenizer("<turn>s:be brief<turn>a:<turn>u:ab<turn>a:")["input_ids"]
    assert list(scripted.requests[0].prompt) == expected


def test_models_are_listed(fake):
    assert [model.id for model in fake.models.list()] == ["tiny"]
    assert fake.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="serves 'tiny'"):
        fake.models.retrieve("other/model")


REFUSED = [
    ({"n": 17}, "n", "16"),
    ({"n": 0}, "n", "1"),
    ({"response_format": {"type": "xml"}}, "response_format", "'xml' is none of"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "schema is missing"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format", "missing"),
    ({"response_format": {"type": "json_object"}}, "response_format", "fast tokenizer"),
    ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex", "only one"),
    ({"guided_choice": []}, "guided_choice", "at least 1"),
    ({"frequency_penalty": 2.5}, "frequency_penalty", "less than or equal to 2"),
    ({"presence_penalty": -3}, "presence_penalty", "greater than or equal to -2"),
    ({"logit_bias": {"5": 101}}, "logit_bias", "100"),
    ({"logit_bias": {"five": 1}}, "logit_bias", "integer"),
    ({"logit_bias": {"260": 1}}, "logit_bias", "not in the vocabulary of 260"),
    ({"top_h": 0}, "top_h", "greater than 0"),
    ({"temperature": 3}, "temperature", "less than or equal to 2"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"stop": ["x"] * 17}, "stop", "16"),
    ({"seed": 2**70}, "seed", "seed"),
]


@pytest.mark.parametrize(("wrong", "param", "words"), REFUSED)
def test_what_cannot_be_done_is_refused(fake, scripted, wrong, param, words):
    for ask in (
        lambda **more: fake.completions.create(model="tiny", prompt="hi", **more),
        lambda **more: fake.chat.completions.create(model="tiny", messages=MESSAGES, **more),
    ):
        with pytest.raises(openai.BadRequestError, match=words) as caught:
            ask(extra_body=wrong)
        assert caught.value.param == param
        assert caught.value.type == "invalid_request_error"
    assert scripted.requests == []


@pytest.mark.parametrize(
    ("asked", "param", "words"),
    [
        ({"prompt": ""}, "prompt", "prompt is empty"),
        ({"prompt": []}, "prompt", "prompt"),
        ({"prompt": [260]}, "prompt", "not in the vocabulary of 260"),
        ({"prompt": [-1]}, "prompt", "prompt"),
        ({"prompt": "hi", "best_of": 2}, "best_of", "best_of must be n, which is 1"),
        ({"prompt": ["hi"] * 65, "n": 2}, "n", "at most 128"),
        ({"prompt": "hi", "suffix": "x"}, "suffix", "not supported"),
        ({"prompt": "hi", "logprobs": 21}, "logprobs", "20"),
    ],
)
def test_completions_that_are_refused(fake, asked, param, words):
    with pytest.raises(openai.BadRequestError, match=words) as caught:
        fake.completions.create(model="tiny", **asked)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("asked", "param", "words"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages", "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "image"),
        ({"messages": MESSAGES, "top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"messages": MESSAGES, "tools": [{"type": "function"}]}, "tools", "not supported"),
    ],
)
def test_chats_that_are_refused(fake, asked, param, words):
    with pytest.raises(openai.BadRequestError, match=words) as caught:
        fake.chat.completions.create(model="tiny", **asked)
    assert caught.value.param == param


def test_other_models_do_not_exist(fake):
    with pytest.raises(openai.NotFoundError, match="serves 'tiny'") as caught:
        fake.completions.create(model="other", prompt="hi")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_prompts_that_do_not_fit_are_refused(real):
    with pytest.raises(openai.BadRequestError, match="201 tokens and the context is 200") as caught:
        real.completions.create(model="tiny", prompt="a" * 201)
    assert caught.value.code == "context_length_exceeded"
    fits = real.completions.create(model="tiny", prompt="a" * 200, max_tokens=999, temperature=0)
    assert (fits.choices[0].finish_reason, fits.usage.completion_tokens) == ("length", 1)


def test_a_failing_engine_is_an_error_of_the_server(fake, scripted):
    scripted.error = "the engine failed"
    asked = {"model": "tiny", "prompt": "hi"}
    with pytest.raises(openai.InternalServerError, match="the engine failed"):
        fake.completions.create(**asked)
    with pytest.raises(openai.APIError, match="the engine failed"):
        list(fake.completions.create(**asked, stream=True))


def test_the_scripted_text_is_whole(fake):
    asked = {"model": "tiny", "messages": MESSAGES}
    choice = fake.chat.completions.create(**asked).choices[0]
    assert (choice.message.content, choice.finish_reason) == (TEXT, "stop")
