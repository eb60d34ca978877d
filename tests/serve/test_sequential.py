"""One sequence at a time: the answers of `stream`, in order, through cancellations and resizes."""

from __future__ import annotations

import asyncio
import threading
from contextlib import asynccontextmanager

import pytest
import torch

from pliant.errors import BudgetError
from pliant.kernels.cpu import multiplies_words
from pliant.plan.memory import activation_bytes, kv_cache_bytes
from pliant.run import Memory, Sampler, load, stream
from pliant.run.generate import encode
from pliant.serve.engine import ClosedError, QueueFullError
from pliant.serve.request import Finished, Piece, Prompt, Request
from pliant.serve.sequential import SequentialEngine

PROMPT = tuple(range(20, 60))


@asynccontextmanager
async def engine_of(model, **options):
    engine = SequentialEngine(model, model.artifact.tokenizer(), **options)
    try:
        yield engine
    finally:
        await engine.close()


async def text_of(answer) -> tuple[str, Finished]:
    pieces, end = [], None
    async for event in answer:
        if isinstance(event, Piece):
            pieces.append(event.text)
        elif isinstance(event, Finished):
            end = event
    return "".join(pieces), end


def alone(model, prompt, **options) -> str:
    return "".join(stream(model, model.artifact.tokenizer(), list(prompt), **options))


def memory_for(model, weights: int) -> int:
    config, context = model.config, model.plan.context
    return kv_cache_bytes(config, context, 1) + activation_bytes(config, context, 1) + weights


class Gate:
    """Counts forward passes, and lets through as many as are allowed."""

    def __init__(self) -> None:
        self.calls, self._opened, self._allowed = 0, False, threading.Semaphore(0)

    def allow(self, count: int) -> None:
        self._allowed.release(count)

    def open(self) -> None:
        """Let everything through from now on."""
        self._opened = True
        self._allowed.release()

    def passed(self) -> None:
        self.calls += 1
        assert self._opened or self._allowed.acquire(timeout=30)

    async def reached(self, calls: int = 1) -> None:
        while self.calls < calls:
            await asyncio.sleep(0.001)


@pytest.fixture
def gate(monkeypatch):
    extend, made = Memory.extend, Gate()

    def waiting(self, tokens, *args):
        made.passed()
        return extend(self, tokens, *args)

    monkeypatch.setattr(Memory, "extend", waiting)
    return made


def test_greedy_text_is_that_of_stream(model):
    prompts = ["hello", "a longer prompt, " * 9, "hello again", "héé"]
    tokenizer = model.artifact.tokenizer()

    async def ask():
        async with engine_of(model) as engine:
            answers = [engine.submit(Request(tuple(encode(tokenizer, p)), 30)) for p in prompts]
            return [await text_of(answer) for answer in answers]

    found = asyncio.run(ask())
    assert [text for text, _ in found] == [
        "".join(stream(model, tokenizer, p, max_new_tokens=30)) for p in prompts
    ]
    assert all(end.reason in ("length", "stop") and end.new_tokens for _, end in found)


def test_sampled_text_and_stop_strings_are_those_of_stream(model):
    sampler = Sampler(temperature=0.8, top_p=0.9, seed=5)
    whole = alone(model, PROMPT, max_new_tokens=60, temperature=0.8, top_p=0.9, seed=5)
    stop = next(c for c in whole[5:] if c.isascii())
    expected = whole[: whole.index(stop)]

    async def ask():
        async with engine_of(model) as engine:
            free = await text_of(engine.submit(Request(PROMPT, 60, sampler)))
            return free, await text_of(engine.submit(Request(PROMPT, 60, sampler, stop=(stop,))))

    (text, _), (cut, end) = asyncio.run(ask())
    assert text == whole
    assert (cut, end.reason) == (expected, "stop")


def test_the_beginning_of_a_prompt_is_not_computed_again(model):
    async def ask():
        async with engine_of(model) as engine:
            first = await text_of(engine.submit(Request(PROMPT, 4)))
            again = await text_of(engine.submit(Request((*PROMPT, 70, 71), 4)))
            return first[1].cached_tokens, again

    cached, (text, end) = asyncio.run(ask())
    assert (cached, end.cached_tokens) == (0, 40)
    assert text == alone(model, (*PROMPT, 70, 71), max_new_tokens=4)


@pytest.mark.skipif(not multiplies_words(), reason="torch rounds by the size of a product")
def test_what_came_before_does_not_change_an_answer(model):
    """Prompts that share beginnings, and hold the answers before them, in three orders."""
    turns = [PROMPT, (*PROMPT, 70, 71, 72), tuple([9] * 129), (*PROMPT, 70), PROMPT[:2], (5,)]

    async def ask(order):
        async with engine_of(model) as engine:
            found = {}
            for place in order:
                said = [e async for e in engine.submit(Request(turns[place], 9, logprobs=1))]
                ids = [token for piece in said[:-1] for token in piece.tokens]
                found[place] = [(token.id, token.logprob) for token in ids]
                longer = (*turns[place], *(token.id for token in ids), 33)
                said = [e async for e in engine.submit(Request(longer, 3, logprobs=1))]
                found[longer] = [t.logprob for piece in said[:-1] for t in piece.tokens]
            return found

    orders = [(0, 1, 2, 3, 4, 5), (5, 3, 1, 0, 2, 4), (2, 4, 4, 0, 0, 1, 1, 3, 5)]
    found = [asyncio.run(ask(order)) for order in orders]
    assert len(found[0]) == 12
    assert found[0] == found[1] == found[2]


def test_cancelling_stops_between_tokens(model, gate):
    async def ask():
        async with engine_of(model) as engine:
            answer = engine.submit(Request(PROMPT, 150))
            gate.allow(3)
            for _ in range(3):
                await anext(answer)
            answer.cancel()
            gate.open()
            _, end = await text_of(answer)
            after = await text_of(engine.submit(Request(PROMPT, 10)))
            return end, after[0], engine.status()

    end, after, status = asyncio.run(ask())
    assert end.reason == "cancelled"
    assert end.new_tokens in (3, 4)  # one more where the pass had begun
    assert after == alone(model, PROMPT, max_new_tokens=10)
    assert (status.waiting, status.running) == (0, 0)


def test_cancelling_stops_between_pieces_of_a_prompt(model, gate):
    async def ask():
        async with engine_of(model) as engine:
            answer = engine.submit(Request(tuple([7] * 190), 5))
            await gate.reached()
            answer.cancel()
            gate.open()
            return await text_of(answer)

    text, end = asyncio.run(ask())
    assert (text, end.reason, gate.calls) == ("", "cancelled", 1)


def test_what_waits_is_cancelled_at_once_and_order_is_kept(model, gate):
    async def ask():
        ended = []
        async with engine_of(model) as engine:

            async def wait(name, answer):
                ended.append((name, (await text_of(answer))[1].reason))

            first = engine.submit(Request(PROMPT, 2))
            await gate.reached()
            names = {"low": 5, "early": 0, "late": 0, "urgent": -5, "unwanted": 0}
            others = {n: engine.submit(Request(PROMPT, 2, priority=p)) for n, p in names.items()}
            waiting = engine.status()
            tasks = [asyncio.create_task(wait("first", first))]
            tasks += [asyncio.create_task(wait(n, answer)) for n, answer in others.items()]
            others["unwanted"].cancel()
            await tasks[-1]
            gate.open()
            await asyncio.gather(*tasks)
        return ended, waiting

    ended, status = asyncio.run(ask())
    assert (status.running, status.waiting) == (1, 5)
    assert ended[0] == ("unwanted", "cancelled")
    assert [name for name, _ in ended[1:]] == ["first", "urgent", "early", "late", "low"]


def test_the_budget_changes_between_tokens(artifact, gate):
    model = load(artifact, weights=190_000, context=200, batch=1)

    async def ask():
        async with engine_of(model) as engine:
            before = engine.status()
            answer = engine.submit(Request(PROMPT, 100))
            await gate.reached()
            change = asyncio.create_task(engine.set_budget(memory_for(model, 80_000)))
            await asyncio.sleep(0)
            gate.open()
            small = await change
            _, end = await text_of(answer)
            text, _ = await text_of(engine.submit(Request(PROMPT, 20)))
            idle = await engine.set_budget(memory_for(model, 150_000))
            return before, small, end, text, idle

    before, small, end, text, idle = asyncio.run(ask())
    assert small.weights <= 80_000 < idle.weights <= 150_000 < before.weights
    assert small.memory == memory_for(model, 80_000)
    assert (small.running, end.reason, end.new_tokens) == (1, "length", 100)
    other = load(artifact, weights=80_000, context=200, batch=1)
    assert text == alone(other, PROMPT, max_new_tokens=20)


def test_a_budget_that_is_too_small_changes_nothing(model):
    async def ask():
        async with engine_of(model) as engine:
            with pytest.raises(BudgetError, match="smallest total"):
                await engine.set_budget(1000)
            return engine.status(), await text_of(engine.submit(Request(PROMPT, 5)))

    plan = model.plan
    status, (text, _) = asyncio.run(ask())
    assert model.plan is plan
    assert status.weights == plan.weight_bytes
    assert text == alone(model, PROMPT, max_new_tokens=5)


@pytest.mark.parametrize("failing", ["extend", "extend_all"])
def test_a_failure_ends_one_request_alone(model, monkeypatch, failing, caplog):
    real, broken = getattr(Memory, failing), []

    def once(self, tokens, *args):
        result = real(self, tokens, *args)
        if not broken:
            broken.append(True)
            raise RuntimeError("out of memory")
        return result

    monkeypatch.setattr(Memory, failing, once)
    scored = failing == "extend_all"

    async def ask():
        async with engine_of(model) as engine:
            first = await text_of(engine.submit(Request(PROMPT, 5, score_prompt=scored)))
            return first, await text_of(engine.submit(Request(PROMPT, 5, score_prompt=scored)))

    (text, end), (after, after_end) = asyncio.run(ask())
    assert (text, end.reason) == ("", "error")
    assert "out of memory" not in end.message
    assert "out of memory" in caplog.text
    assert (after_end.reason, after_end.cached_tokens) == ("length", 0)
    assert after == alone(model, PROMPT, max_new_tokens=5)


def test_a_prompt_is_scored_as_the_model_scores_it(model):
    async def ask():
        async with engine_of(model) as engine:
            return [
                e async for e in engine.submit(Request(PROMPT, 3, logprobs=2, score_prompt=True))
            ]

    prompt, *pieces, _ = asyncio.run(ask())
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([PROMPT])).logits[0].float()
    expected = torch.log_softmax(logits, -1)
    assert isinstance(prompt, Prompt)
    assert [token.id for token in prompt.tokens] == list(PROMPT)
    assert prompt.tokens[0].logprob is None
    for place, token in enumerate(prompt.tokens[1:]):
        assert token.logprob == pytest.approx(float(expected[place, token.id]), abs=0.02)
        best = [logprob for _, logprob in token.likeliest]
        assert best == pytest.approx(expected[place].topk(2).values.tolist(), abs=0.02)
    tokens = [token for piece in pieces for token in piece.tokens]
    assert tokens[0].logprob == pytest.approx(float(expected[-1].max()), abs=0.02)
    assert all(token.logprob == token.likeliest[0][1] for token in tokens)


def test_answers_end_with_the_context_or_at_once(model):
    async def ask():
        async with engine_of(model) as engine:
            full = await text_of(engine.submit(Request(tuple([7] * 195), 50)))
            none = await text_of(engine.submit(Request(PROMPT, 0)))
            long = await text_of(engine.submit(Request(tuple([7] * 201), 5)))
            return full[1], none, long[1]

    full, none, long = asyncio.run(ask())
    assert (full.reason, full.new_tokens) == ("length", 6)
    assert (none[0], none[1].reason, none[1].new_tokens) == ("", "length", 0)
    assert long.reason == "error"
    assert "201 tokens" in long.message


def test_closing_finishes_what_was_taken(model, gate):
    async def ask():
        engine = SequentialEngine(model, model.artifact.tokenizer(), most_waiting=1)
        answers = [engine.submit(Request(PROMPT, 3))]
        await gate.reached()
        answers.append(engine.submit(Request(PROMPT, 3)))
        with pytest.raises(QueueFullError):
            engine.submit(Request(PROMPT, 3))
        closing = asyncio.create_task(engine.close())
        await asyncio.sleep(0)
        with pytest.raises(ClosedError):
            engine.submit(Request(PROMPT, 3))
        with pytest.raises(ClosedError):
            await engine.set_budget(1)
        gate.open()
        await closing
        return [(await text_of(answer))[1].new_tokens for answer in answers], engine.status()

    counts, status = asyncio.run(ask())
    assert counts == [3, 3]
    assert (status.new_tokens, status.prompt_tokens) == (6, 80)
    assert status.cache == kv_cache_bytes(model.config, 200, 1)
