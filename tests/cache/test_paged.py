"""Many sequences in one pass over pages get the logits that each gets alone in a dense cache."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pliant.cache import Chunk, OutOfPages, PagedModel, PagedSequence, PagePool, PageShape
from pliant.cache import paged as paged_module
from pliant.errors import PliantError, UnsupportedModelError
from tests.cache.paging import VOCABULARY, alone, llama, pool_of, random_ids, together
from tests.model.tiny import build, configurations

MODEL = llama()
PAGED = PagedModel(MODEL)
FAMILIES = (
    "llama", "qwen2", "qwen3", "phi", "phi3", "gpt2", "opt", "gpt_neox", "olmo2", "cohere",
    "granite", "mixtral", "qwen3_moe",
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(1, 5), st.integers(1, 7))
def test_ragged_passes_are_each_sequence_alone(data, count, page_tokens):
    passes = data.draw(
        st.lists(
            st.lists(st.sampled_from([0, 1, 1, 1, 2, 5, 11]), min_size=count, max_size=count)
            .filter(any),
            min_size=1, max_size=8,
        )
    )  # fmt: skip
    lengths = [sum(p[i] for p in passes) for i in range(count)]
    ids = random_ids(*lengths)
    pool = pool_of(MODEL, page_tokens)
    sequences = [PagedSequence(pool) for _ in ids]
    kept = [i for i, length in enumerate(lengths) if length]
    found = together(
        PAGED, [sequences[i] for i in kept], [ids[i] for i in kept],
        [[p[i] for i in kept] for p in passes],
    )  # fmt: skip
    for i, logits in zip(kept, found, strict=True):
        own = alone(MODEL, ids[i], [p[i] for p in passes if p[i]], torch.float32)
        torch.testing.assert_close(logits, own, atol=1e-4, rtol=0)
        assert sequences[i].tokens == ids[i]


PASSES = [[7, 1, 2, 9], [1, 1, 1, 1], [1, 6, 1, 1], [1, 1, 1, 1], [5, 1, 0, 9], [1, 1, 1, 1]]


@pytest.mark.parametrize("family", FAMILIES)
def test_families_in_32_and_16_bits(family):
    model = build(configurations()[family])
    paged, lengths = PagedModel(model), [sum(p[i] for p in PASSES) for i in range(4)]
    ids = random_ids(*lengths)
    for dtype in (torch.float32, torch.bfloat16):
        pool = pool_of(model, 4, dtype)
        found = together(paged, [PagedSequence(pool) for _ in ids], ids, PASSES)
        for i, logits in enumerate(found):
            own = alone(model, ids[i], [p[i] for p in PASSES if p[i]], dtype)
            # Sums in another order round a few stored numbers of 16 bits to their neighbours.
            allowed = 1e-4 if dtype == torch.float32 else 2**-8 * own.abs().max()
            assert (logits - own).abs().max() <= allowed


@pytest.mark.parametrize("limit", [8, 4096], ids=["cut", "whole"])
def test_a_common_beginning_read_once_is_the_same(limit, monkeypatch):
    monkeypatch.setattr(paged_module, "GROUP_TOKENS", limit)
    (common,), tails = random_ids(10), random_ids(1, 3, 6, 9, 14, seed=1)
    pool = pool_of(MODEL)
    trunk = PagedSequence(pool)
    PAGED([Chunk(trunk, common)])
    forks = [trunk.fork() for _ in tails]
    for fork, tail in zip(forks, tails, strict=True):
        PAGED([Chunk(fork, tail)])
    assert len({id(fork.pages[1]) for fork in forks}) == 1
    lengths = [len(fork) for fork in forks]
    reads = []
    layer = paged_module.Gather.layer
    monkeypatch.setattr(
        paged_module.Gather, "layer", lambda g, *a: reads.append(len(g.pages)) or layer(g, *a)
    )
    found = PAGED([Chunk(fork, [5]) for fork in forks])
    if limit == 4096:  # in each layer, two common pages, and five tails of as many as the longest
        assert reads == [5 * 5, 2] * 2
    for logits, fork, length in zip(found, forks, lengths, strict=True):
        own = alone(MODEL, fork.tokens, [length, 1], torch.float32)[-1]
        torch.testing.assert_close(logits, own, atol=1e-4, rtol=0)


def test_pages_of_different_bits_are_read_together():
    """Eight bits move the logits little, two bits more; what is read is what decoding gives."""
    ids = random_ids(23, 18, 9)
    moved = {}
    for bits in (16, 8, 2):
        pool = pool_of(MODEL, 4, torch.bfloat16)
        sequences = [PagedSequence(pool) for _ in ids]
        for sequence, text in zip(sequences, ids, strict=True):
            PAGED([Chunk(sequence, text)])
            if bits < 16:
                for page in sequence.pages[1:3]:
                    pool.recode(page, bits)
        moved[bits] = PAGED([Chunk(sequence, [7]) for sequence in sequences])
        if bits < 16:
            for sequence in sequences:  # the same content in pages that are not coded
                for index in range(1, min(3, len(sequence.pages))):
                    (plain,) = pool.take()
                    pool.copy(sequence.pages[index], plain)
                    sequence.share(index, plain)
                sequence.truncate(len(sequence) - 1)
            again = PAGED([Chunk(sequence, [7]) for sequence in sequences])
            torch.testing.assert_close(moved[bits], again, atol=0.03, rtol=0)
    eight, two = ((moved[bits] - moved[16]).abs().mean() for bits in (8, 2))
    assert 0 < eight < 0.1 * two


def test_logits_after_the_last_tokens_only():
    ids = random_ids(6, 1, 9)
    pools = [pool_of(MODEL), pool_of(MODEL)]
    chunks = [[Chunk(PagedSequence(pool), text) for text in ids] for pool in pools]
    last, every = PAGED(chunks[0]), PAGED(chunks[1], every=True)
    assert last.shape == (3, VOCABULARY)
    assert every.shape == (16, VOCABULARY)
    torch.testing.assert_close(last, every[[5, 6, 15]])


def test_a_pass_without_room_changes_nothing():
    ids = random_ids(6, 7)
    pool = pool_of(MODEL, budget=4 * PageShape.of(MODEL.config, 4, torch.float32).nbytes())
    first, second = PagedSequence(pool), PagedSequence(pool)
    PAGED([Chunk(first, ids[0])])
    before = [page.data.clone() for page in first.pages]
    with pytest.raises(OutOfPages):
        PAGED([Chunk(first, ids[1]), Chunk(second, ids[1])])
    assert (len(first), len(second), pool.pages) == (6, 0, 2)
    assert all(torch.equal(a, p.data) for a, p in zip(before, first.pages, strict=True))
    found = PAGED([Chunk(first, ids[1])], every=True)
    torch.testing.assert_close(
        found, alone(MODEL, ids[0] + ids[1], [6, 7], torch.float32)[6:], atol=1e-4, rtol=0
    )


def test_a_pass_that_fails_changes_nothing_and_the_model_stays_usable():
    (ids,) = random_ids(9)
    sequence = PagedSequence(pool_of(MODEL))
    attention = MODEL.config._attn_implementation
    with pytest.raises(IndexError):
        PAGED([Chunk(sequence, [VOCABULARY + 1])])
    assert (len(sequence), sequence.pool.pages) == (0, 0)
    assert MODEL.config._attn_implementation == attention
    PAGED([Chunk(sequence, ids)])
    alone(MODEL, ids, [9], torch.float32)


@torch.inference_mode()
def test_pages_made_in_inference_mode_are_written_out_of_it():
    (ids,) = random_ids(6)
    sequence = PagedSequence(pool_of(MODEL))
    PAGED([Chunk(sequence, ids)])
    with torch.inference_mode(False):
        PAGED([Chunk(sequence, [1])])
    assert len(sequence) == 7


def test_what_a_pass_refuses():
    pool = pool_of(MODEL)
    sequence = PagedSequence(pool)
    for chunks, reason in (
        ([], "at least one"),
        ([Chunk(sequence, [])], "a token for each"),
        ([Chunk(sequence, [1]), Chunk(sequence, [2])], "one chunk"),
        ([Chunk(sequence, [1]), Chunk(PagedSequence(pool_of(MODEL)), [2])], "different pools"),
        ([Chunk(PagedSequence(PagePool(PageShape(2, 2, 8, 8), 1 << 20)), [1])], "not this model"),
    ):
        with pytest.raises(PliantError, match=reason):
            PAGED(chunks)


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "mistral", "gpt_oss", "bloom", "falcon"])
def test_models_that_attend_otherwise_are_refused(family):
    with pytest.raises(UnsupportedModelError, match="a paged cache needs"):
        PagedModel(build(configurations()[family]))


def test_a_model_that_attends_eagerly_is_refused():
    model = llama()
    model.set_attn_implementation("eager")
    with pytest.raises(UnsupportedModelError, match="set to sdpa"):
        PagedModel(model)
