"""Coding policies: errors stay in bounds, bytes are counted to the last, limits change nothing."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from pliant.cache.codings import Grid, LowRank, Nonuniform, Product, Sparse, Transform
from pliant.cache.limited import LimitedModel
from pliant.cache.policies.cskv import CSKV
from pliant.cache.policies.keep import Keep
from pliant.cache.policies.kvquant import KVQuant
from pliant.cache.policies.million import Million
from pliant.cache.policies.mustafar import Mustafar
from pliant.cache.policies.uniform import Uniform
from pliant.cache.policies.waterfill import Waterfill
from pliant.cache.policy import Entries, Layer, find_policy
from pliant.cache.prepare import prepare
from pliant.cache.rotary import Rotary
from pliant.errors import PliantError

from .paging import llama, random_ids
from .test_policy import through

HEADS, DIM, SINKS = 2, 16, 4
ROTARY = Rotary(1e4 ** -(torch.arange(DIM // 2) * 2.0 / DIM))
LAYER = Layer(0, 1, 4, HEADS, DIM, DIM, ROTARY, DIM**-0.5)
FITTING = {"kvquant": KVQuant, "million": Million, "cskv": CSKV, "waterfill": Waterfill}
ALL = {**FITTING, "mustafar": Mustafar, "uniform": Uniform}


def chunk_of(start: int, count: int, seed: int = 0) -> tuple[Entries, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values, queries = (
        torch.randn(heads, 400, DIM, generator=generator)[:, start : start + count]
        for heads in (HEADS, HEADS, 4)
    )
    positions = torch.arange(start, start + count).expand(HEADS, -1)
    return Entries(ROTARY.turn(keys * 2 + 1, positions), values, positions), queries


def fed(policy, chunks: list[int]):
    start = 0
    for count in chunks:
        new, queries = chunk_of(start, count)
        policy.add(new, queries)
        assert len(policy.read(queries)) == start + count
        policy.settle()
        start += count
    return policy


def exact() -> Entries:
    return fed(Keep(LAYER), [200]).read(torch.empty(0))


def errors(policy) -> tuple[torch.Tensor, torch.Tensor]:
    """Of keys and of values, [kv_heads, n, dim]."""
    found, wanted = policy.read(torch.empty(0)), exact()
    assert torch.equal(found.positions, wanted.positions)
    return found.keys - wanted.keys, found.values - wanted.values


@pytest.mark.parametrize("name", ALL)
def test_what_is_kept_does_not_depend_on_the_chunks(name):
    assert find_policy(name).make is ALL[name]
    options = {"fit": 64} if name in FITTING else {}
    once = fed(ALL[name](LAYER, **options), [200])
    parts = fed(ALL[name](LAYER, **options), [1, 1, 60, 30, 8, 1, 99])
    assert parts.nbytes == once.nbytes
    found, wanted = parts.read(torch.empty(0)), once.read(torch.empty(0))
    torch.testing.assert_close(found.keys, wanted.keys)
    torch.testing.assert_close(found.values, wanted.values)


@pytest.mark.parametrize("name", FITTING)
def test_nothing_is_coded_before_there_is_enough_to_fit(name):
    policy = fed(FITTING[name](LAYER, fit=256), [100, 100])
    for error in errors(policy):
        assert not error.any()
    waiting = 4 * HEADS * DIM * DIM if name == "waterfill" else 0  # moments of queries
    assert policy.nbytes == 200 * 2 * HEADS * DIM * 2 + waiting


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_uniform_pages_have_the_engines_bytes_and_errors_of_half_a_step(bits):
    policy = fed(Uniform(LAYER, bits=bits), [200])
    assert policy.nbytes == 12 * policy.shape.nbytes(bits) + 8 * 2 * HEADS * DIM * 2
    wanted = exact()
    for error, states, dim in zip(
        errors(policy), (wanted.keys, wanted.values), (2, 3), strict=True
    ):
        pages = states[:, :192].unflatten(1, (12, 16))
        span = pages.amax(dim, keepdim=True) - pages.amin(dim, keepdim=True)
        bound = span / (2**bits - 1) / 2 * 1.01 + 2e-3 * pages.abs().amax()
        assert (error[:, :192].unflatten(1, (12, 16)).abs() <= bound).all()
        assert not error[:, 192:].any()


def test_widths_that_pages_do_not_have_are_refused():
    with pytest.raises(PliantError, match="a page has"):
        Uniform(LAYER, bits=5)
    with pytest.raises(PliantError, match="16 bits"):
        Uniform(LAYER, bits=16)


def test_nbytes_of_kvquant():
    policy = fed(KVQuant(LAYER, bits=3, outliers=0.05, fit=64, block=32), [200])
    blocks, width, tail = 6, HEADS * DIM, 200 - SINKS - 6 * 32
    codes = 2 * blocks * 32 * width * 3 // 8
    aside = blocks * round(0.05 * 32 * width) * (2 + 2) + blocks * 32 * round(0.05 * width) * (
        1 + 2
    )
    scales = blocks * 32 * 2 * 2
    fitted = 2 * 8 * 2 + 2 * width * 2  # levels of both sides, channels of keys
    assert policy.nbytes == codes + aside + scales + fitted + (SINKS + tail) * 2 * width * 2


def test_nbytes_of_the_others():
    width, tail = HEADS * DIM, 200 - SINKS - 5 * 32  # the last 32 stay
    hot = (SINKS + tail) * 2 * width * 2
    million = fed(Million(LAYER, bits=2, sub=4, fit=64), [200])
    books = 2 * (256 * 4 * 2 + 2 * width * 2)
    assert million.nbytes == 2 * 160 * width * 2 // 8 + books + hot
    cskv = fed(CSKV(LAYER, keys=0.5, values=0.25, fit=64), [200])
    ranks = HEADS * (8 + 4)
    assert cskv.nbytes == 160 * ranks * 2 + DIM * ranks * 2 + hot
    mustafar = fed(Mustafar(LAYER, keys=0.5, values=0.25), [200])
    assert mustafar.nbytes == 160 * (2 * width // 8 + ranks * 2) + (200 - 160) * 2 * width * 2


def test_outliers_are_exact_and_the_rest_within_its_range():
    states = torch.randn(3, HEADS, 32, DIM)
    states[1, 0, 5, 3], states[2, 1, 30, 0] = 300.0, -150.0
    for per_channel in (True, False):
        coding = Nonuniform(4, per_channel=per_channel, outliers=0.05)
        coding.fit(torch.randn(HEADS, 128, DIM))
        found = coding.decode(coding.encode(states))
        assert found[1, 0, 5, 3] == 300
        assert found[2, 1, 30, 0] == -150
        assert (found - states).abs().max() < 1
        without = Nonuniform(4, per_channel=per_channel, outliers=0.0)
        without.fit(torch.randn(HEADS, 128, DIM))
        assert (without.decode(without.encode(states)) - states).abs().max() > 1


def test_q_norm_keeps_the_spread_of_what_is_coded():
    sample = torch.randn(HEADS, 256, DIM)
    spreads = []
    for q_norm in (False, True):
        coding = Nonuniform(2, per_channel=True, outliers=0.0, q_norm=q_norm)
        coding.fit(sample)
        found = coding.decode(coding.encode(sample[None]))
        spreads.append(float(found.std() / sample.std()))
    assert spreads[0] < 0.95
    assert spreads[1] == pytest.approx(1, abs=0.04)


def test_all_channels_and_all_numbers_are_no_loss():
    for policy in (
        CSKV(LAYER, keys=1.0, values=1.0, fit=64),
        CSKV(LAYER, keys=1.0, values=1.0, fit=64, joint=True),
        Mustafar(LAYER, keys=1.0, values=1.0),
    ):
        for error in errors(fed(policy, [200])):
            assert error.abs().max() < 0.06  # coefficients are bfloat16


@pytest.mark.parametrize("joint", [False, True])
def test_states_of_low_rank_are_coded_in_as_many_channels(joint):
    states = torch.randn(HEADS, 96, 3) @ torch.randn(HEADS, 3, DIM)
    coding = LowRank(3, joint=joint)
    coding.fit(states)
    found = coding.decode(coding.encode(states[None]))
    torch.testing.assert_close(found[0], states, atol=0.1, rtol=0.02)


def test_what_is_largest_of_a_token_stays_and_the_rest_is_zero():
    states = torch.randn(2, HEADS, 8, DIM).bfloat16().float()
    coding = Sparse(5)
    found = coding.decode(coding.encode(states))
    assert (found.ne(0).sum(-1) == 5).all()
    assert torch.equal(found[found != 0], states[found != 0])
    left = torch.where(found == 0, states, 0).abs().amax(-1)
    assert (left <= torch.where(found != 0, states.abs(), torch.inf).amin(-1)).all()
    coded = Sparse(5, inner=Grid(8, per_channel=False))
    torch.testing.assert_close(coded.decode(coded.encode(states)), found, atol=0.03, rtol=0)


@pytest.mark.parametrize("own", [False, True])
def test_product_codes_are_the_nearest_entries(own):
    states = torch.randn(3, HEADS, 32, DIM)
    coding = Product(3, sub=2, own=own)
    coding.fit(states.transpose(0, 1).flatten(1, 2))
    found = coding.decode(coding.encode(states))
    books, mean, deviation = (part.float() for part in coding.fitted)
    entries = books.view(HEADS, DIM // 2, -1, 2) if own else books[0].expand(HEADS, DIM // 2, -1, 2)
    left = ((states - mean) / deviation).unflatten(-1, (-1, 2))
    best = (left[..., None, :] - entries[:, None]).square().sum(-1).amin(-1)
    done = ((found - mean) / deviation).unflatten(-1, (-1, 2))
    torch.testing.assert_close((done - left).square().sum(-1), best, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("joint", [False, True])
def test_bits_go_where_variance_is_and_more_of_them_are_nearer(joint):
    spread = 2.0 ** -torch.arange(DIM)
    states = torch.randn(HEADS, 256, DIM) * spread @ torch.linalg.qr(torch.randn(DIM, DIM)).Q
    left = []
    for bits in (1, 2, 4):
        coding = Transform(bits, joint=joint, basis_bits=8)
        coding.fit(states)
        widths = coding._widths.int()
        assert int(widths.sum()) == bits * HEADS * DIM
        assert (widths.diff(dim=1) >= 0).all()  # axes rise in power
        parts = coding.encode(states[None])
        coded = sum(int(part.nbytes) for part in parts)
        assert coded == 256 * HEADS * DIM * bits // 8
        left.append(float((coding.decode(parts) - states).square().mean()))
    assert left[1] < left[0] / 4
    assert left[2] < left[1] / 4
    grid = Grid(2, per_channel=True)
    assert left[1] < float((grid.decode(grid.encode(states[None])) - states).square().mean()) / 4


@pytest.mark.parametrize(
    "make", [partial(KVQuant, LAYER, bits=4), partial(Waterfill, LAYER, keys=4)]
)
def test_where_a_sequence_stands_does_not_change_what_keys_are_coded_as(make):
    def coded(shift: int) -> torch.Tensor:
        policy = make(fit=64)
        new, queries = chunk_of(0, 200)
        positions = new.positions + shift
        by = torch.tensor([shift])
        keys, queries = ROTARY.shift(new.keys, by), ROTARY.shift(queries, by)
        policy.add(Entries(keys, new.values, positions), queries)
        policy.settle()
        assert torch.equal(policy.read(queries).positions, positions)
        return policy.decode(policy.coded)[0]

    here, there = coded(0), coded(3)
    # keys pass through bfloat16 after rotary embedding, so a few fall on the level beside
    assert float((here - there).square().mean()) < 0.01 * float(here.var())


def test_a_policy_with_prepared_codings_waits_for_nothing():
    model, ids = llama(), torch.tensor(random_ids(80, 80))
    make = partial(KVQuant, bits=4, block=16)
    prepared = prepare(model, make, ids)
    _, limited = through(model, partial(make, prepared=prepared), random_ids(60)[0], 10)
    assert all(kept.blocks == 3 for kept in limited.policies)
    with pytest.raises(PliantError, match="prepared for 1 layers"):
        LimitedModel(model, partial(make, prepared=prepared[:1]))
    with pytest.raises(PliantError, match="no codings"):
        prepare(model, lambda layer, fit: Keep(layer), ids)
