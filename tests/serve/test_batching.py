"""Many sequences a pass: each answer is what it would be alone, whoever comes, goes or waits."""

from __future__ import annotations

import asyncio
import random
from contextlib import asynccontextmanager

import pytest
import torch

from pliant.errors import BudgetError
from pliant.run import Sampler, load
from pliant.run.packed import PackedModel
from pliant.serve.batching import BatchingEngine
from pliant.serve.request import Finished, Piece, Prompt, Request

from .test_sequential import PROMPT, Gate


@pytest.fixture(scope="module")
def model(artifact):
    return load(artifact, weights=120_000, context=200, batch=8)


@asynccontextmanager
async def engine_of(model, pages: int | None = None, **options):
    engine = BatchingEngine(model, model.artifact.tokenizer(), **{"fixed": True, **options})
    if pages is not None:  # fewer than a budget would leave
        room = pages * engine.pool.shape.nbytes()
        engine.room.memory = engine.room.reserved + engine.room.weights + room
        engine.pool.budget = room
        engine._answer_tokens = 1.0  # so that requests come in that will not fit
    try:
        yield engine
    finally:
        await engine.close()


async def said(answer) -> tuple[list[tuple[int, float]], Finished]:
    """Ids and logprobs of an answer, and its end."""
    events = [event async for event in answer]
    tokens = [token for event in events if isinstance(event, Piece) for token in event.tokens]
    return [(token.id, token.logprob) for token in tokens], events[-1]


def requests(count: int, seed: int = 0) -> list[Request]:
    """Prompts of many lengths, some with a common beginning, greedy or sampled."""
    chooser, common = random.Random(seed), tuple(range(30, 78))
    made = []
    for i in range(count):
        own = tuple(chooser.randrange(10, 200) for _ in range(chooser.randrange(1, 60)))
        sampler = Sampler(temperature=0.7, top_p=0.9, seed=i) if i % 3 == 2 else Sampler()
        made.append(Request((*common, *own) if i % 2 else own, 5 + i % 4 * 12, sampler, logprobs=0))
    return made


def answers_of(model, asked, together: bool, **options):
    async def ask():
        async with engine_of(model, **options) as engine:
            if not together:
                return [await said(engine.submit(request)) for request in asked]
            answers = [engine.submit(request) for request in asked]
            return await asyncio.gather(*(said(answer) for answer in answers))

    return asyncio.run(ask())


def assert_same(found, expected) -> None:
    """Passes of other sizes round otherwise in the last bits, and keys are kept in 16."""
    for (tokens, end), (own, own_end) in zip(found, expected, strict=True):
        assert [token for token, _ in tokens] == [token for token, _ in own]
        assert (end.reason, end.new_tokens) == (own_end.reason, own_end.new_tokens)
        assert [logprob for _, logprob in tokens] == pytest.approx(
            [logprob for _, logprob in own], abs=0.05
        )


def test_answers_are_those_of_requests_that_run_alone(model):
    asked = requests(12)
    assert_same(answers_of(model, asked, True), answers_of(model, asked, False))


def test_answers_are_those_of_the_model(model):
    """Against the model's own forward over the whole text, token for token."""
    asked = [Request(r.prompt, 12, logprobs=0) for r in requests(5)]
    for request, (tokens, end) in zip(asked, answers_of(model, asked, True), strict=True):
        ids = [token for token, _ in tokens]
        whole = torch.tensor([[*request.prompt, *ids]])
        with torch.inference_mode():
            scores = torch.log_softmax(model(input_ids=whole).logits[0].float(), -1)
        assert end.new_tokens == len(ids) == 12
        for place, (token, logprob) in enumerate(tokens, len(request.prompt) - 1):
            assert logprob == pytest.approx(float(scores[place, token]), abs=0.1)
            assert float(scores[place].max()) - float(scores[place, token]) < 0.1


def test_they_run_in_the_same_passes(model, monkeypatch):
    sizes, call = [], PackedModel.__call__

    def counting(self, chunks, every=False):
        sizes.append([len(chunk.tokens) for chunk in chunks])
        return call(self, chunks, every)

    monkeypatch.setattr(PackedModel, "__call__", counting)
    asked = [Request(PROMPT[: 9 + i], 20) for i in range(6)]
    answers_of(model, asked, True)
    decoding = [size for size in sizes if size == [1] * 6]
    assert len(decoding) >= 15
    assert any(1 in size and max(size) > 1 for size in sizes) or sizes[0] == [9, 10, 11, 12, 13, 14]


def test_a_common_beginning_is_read_once(model):
    asked = [Request((*PROMPT, *PROMPT, 5 + i), 3) for i in range(4)]

    async def ask():
        async with engine_of(model) as engine:
            first = await said(engine.submit(asked[0]))
            others = [engine.submit(request) for request in asked[1:]]
            ends = [(await said(answer))[1] for answer in others]
            return first[1].cached_tokens, ends, engine.status().prompt_tokens

    cached, ends, prompts = asyncio.run(ask())
    assert cached == 0
    assert [end.cached_tokens for end in ends] == [80] * 3  # of 81: five pages of 16
    assert prompts == 4 * 81


def test_answers_to_one_prompt_share_it(model):
    """They come at once, and only the first reads it."""
    asked = [Request(PROMPT, 3, Sampler(temperature=1.0, seed=i)) for i in range(4)]
    ends = [end for _, end in answers_of(model, asked, True)]
    assert [end.cached_tokens for end in ends] == [0, 32, 32, 32]  # of 40: two pages of 16
    assert [end.reason for end in ends] == ["length"] * 4


def test_where_pages_run_short_the_last_comer_gives_way_and_is_finished_later(model):
    asked = requests(8, seed=3)
    expected = answers_of(model, asked, False)
    for pages in (26, 16):
        assert_same(answers_of(model, asked, True, pages=pages), expected)


def test_one_that_never_fits_ends_alone(model):
    async def ask():
        async with engine_of(model, pages=4) as engine:
            large = engine.submit(Request(tuple(range(20, 120)), 5))
            small = engine.submit(Request(PROMPT[:20], 5))
            grown = engine.submit(Request(PROMPT, 100))
            return [await said(answer) for answer in (large, small, grown)], engine.pool

    ((_, large), (tokens, small), (_, grown)), pool = asyncio.run(ask())
    assert large.reason == grown.reason == "error"
    assert "KV cache" in large.message
    assert grown.new_tokens == 25  # four pages hold 40 tokens of the prompt and 24 more
    assert (small.reason, len(tokens)) == ("length", 5)
    assert pool.nbytes <= pool.budget


@pytest.fixture
def gate(monkeypatch):
    call, made = PackedModel.__call__, Gate()

    def waiting(self, *args):
        made.passed()
        return call(self, *args)

    monkeypatch.setattr(PackedModel, "__call__", waiting)
    return made


def test_cancelling_frees_pages_and_leaves_the_others_alone(model, gate):
    async def ask():
        async with engine_of(model) as engine:
            kept, gone = engine.submit(Request(PROMPT, 30)), engine.submit(Request(PROMPT[5:], 150))
            gate.allow(3)
            await anext(gone)
            gone.cancel()
            gate.open()
            end = (await said(gone))[1]
            rest = (await said(kept))[1]
            return end, rest, engine.status()

    end, rest, status = asyncio.run(ask())
    assert end.reason == "cancelled"
    assert (rest.reason, rest.new_tokens) == ("length", 30)
    assert (status.waiting, status.running) == (0, 0)


def test_urgent_requests_come_in_first(model, gate):
    async def ask():
        ended = []
        async with engine_of(model, pages=4) as engine:

            async def wait(name, answer):
                ended.append((name, (await said(answer))[1].reason))

            first = asyncio.create_task(wait("first", engine.submit(Request(PROMPT[:33], 2))))
            await gate.reached()
            names = {"low": 5, "early": 0, "late": 0, "urgent": -5}
            asked = {n: Request(PROMPT[3:36], 2, priority=p) for n, p in names.items()}
            tasks = [asyncio.create_task(wait(n, engine.submit(r))) for n, r in asked.items()]
            await asyncio.sleep(0.01)
            gate.open()
            await asyncio.gather(first, *tasks)
        return ended

    assert [name for name, _ in asyncio.run(ask())][:2] == ["first", "urgent"]


def test_the_budget_changes_between_passes(artifact, gate):
    model = load(artifact, weights=190_000, context=200, batch=1)

    async def ask():
        async with engine_of(model, fixed=False) as engine:
            answer = engine.submit(Request(PROMPT, 100))
            await gate.reached()
            pages = engine.room.shape.nbytes() * engine.room.shape.pages(200)
            wanted = engine.room.reserved + pages + 80_000
            change = asyncio.create_task(engine.set_budget(wanted))
            await asyncio.sleep(0)
            gate.open()
            small = await change
            _, end = await said(answer)
            after = await said(engine.submit(Request(PROMPT, 20, logprobs=0)))
            with pytest.raises(BudgetError, match="smallest weights"):
                await engine.set_budget(1000)
            return small, end, after

    small, end, (tokens, last) = asyncio.run(ask())
    assert 70_000 < small.weights < 90_000
    assert end.resized
    assert not last.resized
    assert (end.reason, end.new_tokens) == ("length", 100)
    assert last.cached_tokens == 0  # nothing of the other weights is left
    other = load(artifact, weights=small.weights, context=200, batch=1)
    assert_same([(tokens, last)], answers_of(other, [Request(PROMPT, 20, logprobs=0)], False))


def test_a_failed_pass_ends_those_in_it_alone(model, monkeypatch, caplog):
    call, broken = PackedModel.__call__, []

    def once(self, *args):
        if not broken:
            broken.append(True)
            raise RuntimeError("out of memory")
        return call(self, *args)

    monkeypatch.setattr(PackedModel, "__call__", once)
    first, second = answers_of(model, [Request(PROMPT, 5)] * 2, False)
    assert first[1].reason == "error"
    assert "out of memory" not in first[1].message
    assert "out of memory" in caplog.text
    assert second[1].reason == "length"


def test_a_prompt_is_scored_while_others_decode(model):
    async def ask():
        async with engine_of(model) as engine:
            other = engine.submit(Request(PROMPT[:7], 30))
            scored = engine.submit(Request(PROMPT, 3, logprobs=2, score_prompt=True))
            single = engine.submit(Request(PROMPT[:1], 0, logprobs=1, score_prompt=True))
            return [e async for e in scored], [e async for e in single], await said(other)

    (prompt, *_, end), (alone, _), (_, last) = asyncio.run(ask())
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([PROMPT])).logits[0].float()
    expected = torch.log_softmax(logits, -1)
    assert isinstance(prompt, Prompt)
    assert [token.id for token in prompt.tokens] == list(PROMPT)
    for place, token in enumerate(prompt.tokens[1:]):
        assert token.logprob == pytest.approx(float(expected[place, token.id]), abs=0.05)
    assert (end.new_tokens, last.new_tokens) == (3, 30)
    assert isinstance(alone, Prompt)
    assert [token.logprob for token in alone.tokens] == [None]


def test_answers_end_with_the_context_or_at_once(model):
    asked = [Request(tuple([7] * 195), 50), Request(PROMPT, 0), Request(tuple([7] * 201), 5)]
    (_, full), (tokens, none), (_, long) = answers_of(model, asked, True)
    assert (full.reason, full.new_tokens) == ("length", 6)
    assert (tokens, none.reason, none.new_tokens) == ([], "length", 0)
    assert long.reason == "error"
    assert "201 tokens" in long.message


def test_closing_finishes_what_was_taken(model, gate):
    async def ask():
        engine = BatchingEngine(model, model.artifact.tokenizer())
        answers = [engine.submit(Request(PROMPT, 3)) for _ in range(3)]
        await gate.reached()
        closing = asyncio.create_task(engine.close())
        await asyncio.sleep(0)
        gate.open()
        await closing
        return [(await said(answer))[1].new_tokens for answer in answers]

    assert asyncio.run(ask()) == [3, 3, 3]
