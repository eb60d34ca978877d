"""Streaming gives the tokens that transformers gives, inside the planned context."""

from __future__ import annotations

import pytest
import torch

from pliant.cache import DenseCache
from pliant.errors import PliantError
from pliant.run import Memory, Sampler, Usage, generate_tokens, load, stream
from pliant.run.generate import pieces

from .tiny import ByteTokenizer, ChatTokenizer

PROMPT = list(range(20, 70))


def greedy(model, tokens, count, **options):
    return list(generate_tokens(model, tokens, Sampler(), max_new_tokens=count, **options))


def test_greedy_tokens_are_those_of_transformers(model):
    found = greedy(model, PROMPT, 30)
    ids = torch.tensor([PROMPT])
    expected = model.generate(ids, max_new_tokens=30, do_sample=False, eos_token_id=None)
    assert found == expected[0, 50:].tolist()


@pytest.mark.parametrize("chunk", [1, 7, 50, 128])
def test_the_prefill_chunk_changes_nothing(model, chunk):
    assert greedy(model, PROMPT, 10, prefill_chunk=chunk) == greedy(model, PROMPT, 10)


@pytest.mark.parametrize(
    ("count", "chunk", "sizes"),
    [
        (0, 4, []), (1, 4, [1]), (4, 4, [4]), (5, 4, [3, 2]), (9, 4, [4, 3, 2]), (10, 4, [4, 4, 2]),
        (3, 2, [2, 1]), (3, 1, [1, 1, 1]), (4, 3, [2, 2]),
    ],
)  # fmt: skip
def test_no_token_of_a_prompt_is_alone(count, chunk, sizes):
    tokens = list(range(count))
    found = list(pieces(tokens, chunk))
    assert [len(piece) for piece in found] == sizes
    assert [token for piece in found for token in piece] == tokens


def test_generate_uses_a_cache_of_the_planned_size(model, monkeypatch):
    made, seen = [], []
    real, forward = model.new_cache, type(model).forward
    monkeypatch.setattr(model, "new_cache", lambda: made.append(real()) or made[-1])

    def watched(self, *args, **kwargs):
        seen.append(kwargs["input_ids"].shape[1])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", watched)
    monkeypatch.setattr(type(model), "step", lambda *args: False)
    monkeypatch.setattr(type(model), "prompt", lambda *args: None)
    ids = torch.arange(3, 153)[None]
    model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert isinstance(made[0], DenseCache)
    assert made[0].nbytes == model.plan.breakdown.kv_cache
    assert seen == [128, 22, 1, 1]


def test_what_does_not_fit_is_refused(model):
    with pytest.raises(PliantError, match="201 tokens and the context is 200"):
        greedy(model, [5] * 201, 1)
    with pytest.raises(PliantError, match="planned context of 200"):
        model.generate(torch.full((1, 190), 5), max_new_tokens=20, do_sample=False)
    with pytest.raises(PliantError, match="batch=2"):
        model.generate(torch.full((2, 9), 5), max_new_tokens=2, do_sample=False)
    with pytest.raises(PliantError, match="prompt is empty"):
        greedy(model, [], 1)
    with pytest.raises(PliantError, match="top_p"):
        Sampler(0.5, 0.0)
    with pytest.raises(PliantError, match="temperature"):
        Sampler(-1.0)


def test_generation_ends_for_a_reason(model):
    usage = Usage()
    tokens = greedy(model, PROMPT, 8, usage=usage)
    assert (usage.finish, usage.new_tokens, usage.prompt_tokens) == ("length", 8, 50)
    assert usage.prefill_tps > 0
    assert usage.decode_tps > 0
    usage = Usage()
    ended = greedy(model, PROMPT, 8, usage=usage, end=frozenset(tokens[-1:]))
    assert ended == tokens[: tokens.index(tokens[-1])]
    assert usage.finish == "stop"
    usage = Usage()
    assert len(greedy(model, [5] * 195, 50, usage=usage)) == 6
    assert usage.finish == "context"


def test_a_memory_skips_what_it_has_seen(model):
    memory, usage = Memory(model), Usage()
    first = greedy(model, PROMPT, 5, memory=memory)
    again = greedy(model, [*PROMPT, *first, 30, 31], 5, memory=memory, usage=usage)
    assert usage.cached_tokens == 54
    assert again == greedy(model, [*PROMPT, *first, 30, 31], 5)
    other = greedy(model, [*PROMPT[:20], 99, 98], 5, memory=memory, usage=usage)
    assert usage.cached_tokens == 20
    assert other == greedy(model, [*PROMPT[:20], 99, 98], 5)


def test_a_resized_model_forgets_what_its_old_weights_computed(artifact):
    model = load(artifact, weights=80_000, context=100)
    memory, usage = Memory(model), Usage()
    greedy(model, PROMPT, 5, memory=memory)
    model.resize(weights=190_000)
    found = greedy(model, PROMPT, 5, memory=memory, usage=usage)
    assert usage.cached_tokens == 0
    assert found == greedy(load(artifact, weights=190_000, context=100), PROMPT, 5)


def test_sampling_follows_its_seed_and_top_p(model):
    def draw(**options):
        return list(generate_tokens(model, PROMPT, Sampler(**options), max_new_tokens=12))

    assert draw(temperature=1.0, seed=3) == draw(temperature=1.0, seed=3)
    assert draw(temperature=1.0, seed=3) != draw(temperature=1.0, seed=4)
    assert draw(temperature=1.0, top_p=1e-6, seed=3) == draw()
    logits = torch.tensor([0.0, 3.0, 2.0, -1.0])
    sampler = Sampler(1.0, 0.9, 0)
    generator = sampler.generator()
    assert {sampler.choose(logits, generator) for _ in range(200)} == {1, 2}


def test_text_messages_and_tokens_are_prompts(model):
    plain, chat = ByteTokenizer(), ChatTokenizer()

    def text(*args, **options):
        return "".join(stream(model, *args, max_new_tokens=12, **options))

    assert text(plain, "hello") == text(plain, plain("hello")["input_ids"])
    message = [{"role": "user", "content": "hello"}]
    assert text(chat, "hello") == text(chat, message)
    assert text(chat, message) == text(chat, chat("<turn>u:hello<turn>a:")["input_ids"])
    assert text(chat, "hello", raw=True) == text(plain, "hello")
    with pytest.raises(PliantError, match="no chat template"):
        text(plain, message)


def test_a_stop_string_ends_the_answer(model):
    whole = "".join(stream(model, ByteTokenizer(), "hello", max_new_tokens=30))
    usage = Usage()
    stop = whole[5:8]
    pieces = stream(model, ByteTokenizer(), "hello", max_new_tokens=30, stop=[stop], usage=usage)
    assert "".join(pieces) == whole[: whole.index(stop)]
    assert usage.finish == "stop"
