"""Choosing calibration text: each way finds what it looks for, where random does not."""

from __future__ import annotations

import inspect
import textwrap

import pytest
import torch

from pliant.errors import PliantError
from pliant.methods import catalog
from pliant.methods.calibrate.autocoreset import autocoreset
from pliant.methods.calibrate.domain_mix import domain_mix, shares
from pliant.methods.calibrate.random import random
from pliant.methods.calibrate.zip_fit import zip_fit
from pliant.observe import Candidates, choose_windows

NAMES = ("random", "zip_fit", "domain_mix", "medoids", "autocoreset")


def everything(n: int = 24, seed: int = 0) -> Candidates:
    """Candidates of which everything is known."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 50, (n, 8), generator=generator)
    return Candidates(
        ids,
        texts=tuple(" ".join(map(str, row.tolist())) for row in ids),
        target="7 8 9 10 11 12 13",
        target_ids=torch.arange(7, 14),
        sources=torch.arange(n) % 3,
        states=torch.randn(n, 6, generator=generator),
        losses=torch.randn(n, 4, generator=generator) + 3,
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_way_of_choosing(name: str) -> None:
    info = catalog()[name]
    assert info.kind == "calibrate"
    assert set(info.needs) <= {f for f in Candidates.__dataclass_fields__ if f != "ids"}
    pool = everything()
    for count in (1, 7, len(pool)):
        found = info.function(pool, count, seed=3)
        assert found.indices.shape == found.weights.shape == (count,)
        assert len(set(found.indices.tolist())) == count
        assert 0 <= int(found.indices.min()) <= int(found.indices.max()) < len(pool)
        assert float(found.weights.min()) > 0
        assert float(found.weights.mean()) == pytest.approx(1, abs=1e-5)
        again = info.function(pool, count, seed=3)
        assert torch.equal(found.indices, again.indices)
        assert torch.equal(found.weights, again.weights)
    for count in (0, len(pool) + 1):
        with pytest.raises(PliantError, match="cannot be chosen"):
            info.function(pool, count)
    if info.needs:
        with pytest.raises(PliantError, match="needs"):
            info.function(Candidates(pool.ids), 2)


def test_random_is_the_choice_of_windows() -> None:
    pool = everything()
    found = random(pool, 5, seed=4)
    assert torch.equal(pool.ids[found.indices], choose_windows(pool.ids, 5, seed=4))
    assert not torch.equal(random(pool, 5, seed=5).indices, found.indices)


def code_and_prose() -> tuple[list[str], list[str]]:
    """Pieces of Python's own library: statements, and the sentences of its documentation."""
    source = inspect.getsource(textwrap) + inspect.getsource(inspect)
    code = [line for line in source.splitlines() if line.strip() and '"""' not in line]
    prose = (PROSE * 40).split()
    return (
        ["\n".join(code[i : i + 12]) for i in range(0, 240, 12)],
        [" ".join(prose[i * 37 : i * 37 + 90]) for i in range(20)],
    )


PROSE = """
The harbour was quiet when the last of the boats came in, and the men who had waited on the stone
wall since noon went down to help with the nets. Nobody spoke of the weather. An old woman sold
bread from a basket, as she had done for thirty years, and the children ran between the ropes and
were told, as every evening, that they would fall. By the time the lamps were lit the tide had
turned, and what could be seen of the sea was a line of grey under a darker grey. It is said that
the first houses were built by people who had lost their way in winter and did not trust the
spring; their grandchildren kept the habit of closing every shutter before supper.
"""


def test_zip_fit_chooses_what_is_like_the_target() -> None:
    code, prose = code_and_prose()
    texts = (*prose[:10], *code[:10])
    ids = torch.zeros(20, 4)
    for target, wanted in ((code[10:], range(10, 20)), (prose[10:], range(10))):
        pool = Candidates(ids, texts=texts, target="\n".join(target))
        found = zip_fit(pool, 8)
        assert set(found.indices.tolist()) <= set(wanted)


def test_zip_fit_passes_over_copies() -> None:
    code, prose = code_and_prose()
    texts = (code[0],) * 5 + (code[1], *prose[:4])
    pool = Candidates(torch.zeros(10, 2), texts=texts, target=code[0])
    assert zip_fit(pool, 6).indices.tolist()[:2] == [0, 5]
    assert set(zip_fit(pool, 6).indices.tolist()) == {0, 5, 6, 7, 8, 9}
    assert len(set(zip_fit(pool, 10).indices.tolist())) == 10


def domains(parts: tuple[float, ...], tokens: int, seed: int) -> torch.Tensor:
    """Tokens of three domains, each with words of its own beside shared ones."""
    generator = torch.Generator().manual_seed(seed)
    domain = torch.multinomial(torch.tensor(parts), tokens, True, generator=generator)
    own = 100 * (domain + 1) + torch.randint(0, 40, (tokens,), generator=generator)
    shared = torch.randint(0, 60, (tokens,), generator=generator)
    return torch.where(torch.rand(tokens, generator=generator) < 0.5, own, shared)


@pytest.mark.parametrize("parts", [(1.0, 0.0, 0.0), (0.0, 0.5, 0.5), (0.2, 0.2, 0.6)])
def test_domain_mix_finds_the_targets_shares(parts: tuple[float, ...]) -> None:
    one_hot = [tuple(float(i == j) for j in range(3)) for i in range(3)]
    texts = [domains(own, 4000, 7 + i) for i, own in enumerate(one_hot)]
    target = domains(parts, 4000, 3)
    found = shares(texts, target)
    assert float(found.sum()) == pytest.approx(1)
    torch.testing.assert_close(found, torch.tensor(parts).double(), atol=0.03, rtol=0)
    pool = Candidates(
        torch.cat([text.view(40, 100) for text in texts]),
        sources=torch.arange(3).repeat_interleave(40),
        target_ids=target,
    )
    chosen = domain_mix(pool, 20)
    counts = torch.bincount(chosen.indices // 40, minlength=3)
    torch.testing.assert_close(
        counts.double() / 20, torch.tensor(parts).double(), atol=0.051, rtol=0
    )
    assert len(set(domain_mix(pool, 100).indices.tolist())) == 100, "the others fill up"


def test_shares_are_the_most_likely_ones() -> None:
    """No mixture on a grid makes the target likelier."""
    texts = [domains(own, 500, i) for i, own in enumerate([(0.7, 0.3, 0.0), (0.1, 0.4, 0.5)])]
    target = domains((0.3, 0.3, 0.4), 800, 9)

    def likelihood(weight: float) -> float:
        size = 500
        rows = [torch.bincount(t, minlength=size).double() / len(t) for t in texts]
        rows = [
            0.99 * row + 0.01 / (1 + int(max(t.max() for t in [*texts, target]))) for row in rows
        ]
        mixed = weight * rows[0] + (1 - weight) * rows[1]
        return float(mixed[target].log().sum())

    found = float(shares(texts, target)[0])
    best = max(torch.linspace(0, 1, 1001).tolist(), key=likelihood)
    assert found == pytest.approx(best, abs=0.002)


def gap(losses: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> float:
    """How far the weighted mean of the chosen loss vectors is from the mean of all."""
    mean = (weights.double()[:, None] * losses.double()[indices]).mean(0)
    return float((mean - losses.double().mean(0)).norm())


def test_autocoreset_has_the_mean_losses_of_all() -> None:
    """At equal count, a hundredth of random's gap in the median, and below each of 20 draws."""
    generator = torch.Generator().manual_seed(0)
    losses = (
        3
        + torch.randn(200, 1, generator=generator)
        + 0.3 * torch.randn(200, 8, generator=generator)
    )
    pool = Candidates(torch.zeros(200, 2), losses=losses)
    found = autocoreset(pool, 16)
    mine = gap(losses, found.indices, found.weights)
    drawn = []
    for seed in range(20):
        other = random(pool, 16, seed=seed)
        drawn.append(gap(losses, other.indices, other.weights))
    assert mine < 0.01 * sorted(drawn)[10]
    assert mine < min(drawn)


def test_autocoreset_weighs_by_how_many_a_member_stands_for() -> None:
    sizes = torch.tensor([30, 10, 5, 15])
    distinct = torch.eye(4)
    losses = distinct.repeat_interleave(sizes, 0)
    found = autocoreset(Candidates(torch.zeros(60, 2), losses=losses), 4, ridge=1e-9)
    kinds = torch.arange(4).repeat_interleave(sizes)[found.indices]
    assert sorted(kinds.tolist()) == [0, 1, 2, 3]
    torch.testing.assert_close(
        found.weights, sizes[kinds].float() / sizes.float().mean(), atol=1e-3, rtol=1e-3
    )


def test_autocoreset_of_all_weighs_all_alike() -> None:
    pool = everything()
    torch.testing.assert_close(
        autocoreset(pool, len(pool)).weights, torch.ones(24), atol=0.01, rtol=0
    )
