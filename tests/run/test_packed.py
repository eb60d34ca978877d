"""The native pass over pages: what the model says, and each token's bits its own."""

from __future__ import annotations

import pytest
import torch

from pliant.cache import Chunk, OutOfPages, PagedModel, PagedSequence, PagePool
from pliant.errors import PliantError
from pliant.kernels.cpu import multiplies_words
from pliant.kernels.cpu.build import library
from pliant.run.live import RunningModel
from pliant.run.packed import PackedModel

from .test_prompt import held
from .test_step import CONFIGS

pytestmark = pytest.mark.skipif(
    library() is None or not multiplies_words(), reason="there are no native kernels for it"
)

PLENTY = 1 << 30


def running(name: str):
    """A random model of this configuration with native steps."""
    model = held(name)
    kind = type(model)
    model.__class__ = type(kind.__name__, (RunningModel, kind), {"__module__": kind.__module__})
    model.plan = object()  # only its identity counts here
    return model


@pytest.fixture(scope="module")
def model():
    return running("odd widths")


def texts(model, *lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(sum(lengths))
    top = model.config.vocab_size
    return [torch.randint(0, top, (n,), generator=generator).tolist() for n in lengths]


def read(model, pool, ids, cut: int = 1000) -> list[PagedSequence]:
    """Sequences that hold `ids`, each read in pieces of `cut`."""
    made = [PagedSequence(pool) for _ in ids]
    for sequence, tokens in zip(made, ids, strict=True):
        for start in range(0, len(tokens), cut):
            model([Chunk(sequence, tokens[start : start + cut])])
    return made


def code(pool, sequences, widths=(16, 8, 4, 3, 2)) -> None:
    for sequence in sequences:
        for index, page in enumerate(sequence.pages[: len(sequence) // pool.shape.tokens]):
            if widths[index % len(widths)] < page.bits:
                pool.recode(page, widths[index % len(widths)])


def close(found, expected) -> None:
    assert float((found - expected).norm() / expected.norm()) < 0.03


@pytest.mark.parametrize("name", [*CONFIGS, "odd widths"])
def test_it_says_what_the_model_says_with_pages_of_all_widths(name):
    model = running(name)
    packed, paged = PackedModel(model), PagedModel(model)
    assert packed._native(PagePool(packed.shape, PLENTY)) is not None
    pool = PagePool(packed.shape, PLENTY)
    ids = texts(model, 1, 15, 16, 17, 33, 100)
    sides = {m: read(m, pool, ids, 50) for m in (packed, paged)}
    for sequences in sides.values():
        code(pool, sequences)
    for step in range(3):
        close(*(m([Chunk(s, [step + 3], True) for s in own]) for m, own in sides.items()))
    more = texts(model, 3, 1, 20, 2, 40, 5)
    close(*(
        m([Chunk(s, t) for s, t in zip(own, more, strict=True)]) for m, own in sides.items()
    ))  # fmt: skip
    close(*(
        m([Chunk(s, t) for s, t in zip(own, more, strict=True)], every=True)
        for m, own in sides.items()
    ))  # fmt: skip


def answers(packed, sequences, groups, steps: int = 4) -> torch.Tensor:
    """Logits [sequences, steps, vocabulary] of answers made in passes of these groups."""
    found = [[] for _ in sequences]
    for step in range(steps):
        for group in groups:
            some = [Chunk(sequences[i], [3 + step + i], True) for i in group]
            for i, logits in zip(group, packed(some), strict=True):
                found[i].append(logits.clone())
    return torch.stack([torch.stack(own) for own in found])


@pytest.mark.parametrize("coded", [False, True])
def test_bits_do_not_depend_on_company_or_cuts(model, coded):
    packed = PackedModel(model)
    pool = PagePool(packed.shape, PLENTY)
    ids = texts(model, *(3 + 7 * i for i in range(20)))
    runs = []
    for cut, groups in ((1000, [range(20)]), (13, [[i] for i in range(20)]),
                        (1, [range(0, 20, 2), range(19, 0, -2)])):  # fmt: skip
        sequences = read(packed, pool, ids, cut)
        if coded:
            code(pool, sequences)
        runs.append(answers(packed, sequences, groups))
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


def test_bits_do_not_depend_on_sharing_or_on_prompts_in_the_pass(model):
    packed = PackedModel(model)
    pool = PagePool(packed.shape, PLENTY)
    common, other = texts(model, 64, 40)
    alone = read(packed, pool, [common, common])
    first = read(packed, pool, [common])[0]
    shared = [first, first.fork()]
    expected = answers(packed, alone, [[0], [1]])
    beside = PagedSequence(pool)
    found = [[], []]
    for step in range(4):
        chunks = [Chunk(s, [3 + step + i], True) for i, s in enumerate(shared)]
        chunks.insert(step % 3, Chunk(beside, other[10 * step : 10 * step + 10]))
        logits = packed(chunks)
        for chunk, row in zip(chunks, logits, strict=True):
            if chunk.decode:
                found[shared.index(chunk.sequence)].append(row.clone())
    assert torch.equal(torch.stack([torch.stack(own) for own in found]), expected)


def test_mistakes_change_nothing(model):
    packed = PackedModel(model)
    pool = PagePool(packed.shape, 3 * packed.shape.nbytes())
    sequence = read(packed, pool, texts(model, 20))[0]
    before = (len(sequence), pool.nbytes)
    for tokens in ([-1], [3, model.config.vocab_size]):
        with pytest.raises(PliantError, match="is not one of"):
            packed([Chunk(sequence, tokens)])
    with pytest.raises(OutOfPages):
        packed([Chunk(sequence, [3] * 40)])
    with pytest.raises(PliantError, match="one token a pass"):
        packed([Chunk(sequence, [3, 4], decode=True)])
    assert (len(sequence), pool.nbytes) == before


def test_what_it_does_not_cover_goes_through_transformers(model):
    packed = PackedModel(model)
    pool = PagePool(packed._paged.shape.__class__.of(model.config, 16, torch.float32), PLENTY)
    assert packed._native(pool) is None
    sequence = PagedSequence(pool)
    assert packed([Chunk(sequence, [3, 4, 5])]).shape == (1, model.config.vocab_size)
