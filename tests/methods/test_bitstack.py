"""BitStack: fewer blocks are a prefix of more, and each block lowers the error."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from pliant.codes import LowRank, Signed
from pliant.errors import PliantError, RecipeError
from pliant.fit.recipe import RungSpec
from pliant.methods.factorize.bitstack import bitstack
from pliant.observe.statistics import Statistics

torch.set_num_threads(1)


def problem(out: int = 64, width: int = 120) -> tuple[torch.Tensor, Statistics]:
    torch.manual_seed(0)
    weight = torch.randn(out, width) * torch.exp(0.5 * torch.randn(out, 1)) * 0.05
    scale = torch.exp(torch.randn(width))
    return weight, Statistics(second_moment=torch.diag(scale**2))


def error(weight: torch.Tensor, code, statistics: Statistics) -> float:
    diagonal = statistics.second_moment.diagonal()
    return float(((weight - code.decode()) ** 2 * diagonal).sum() / (weight**2 * diagonal).sum())


def test_fewer_blocks_are_exactly_a_prefix_of_more() -> None:
    weight, statistics = problem()
    codes = [bitstack(weight, statistics, blocks=n, rank=2) for n in range(1, 6)]
    for n, (less, more) in enumerate(pairwise(codes), start=1):
        assert len(less.parts) == n
        assert len(more.parts) == n + 1
        for own, other in zip(less.parts, more.parts[:n], strict=True):
            assert own.meta() == other.meta()
            assert own.tensors().keys() == other.tensors().keys()
            for key, tensor in own.tensors().items():
                assert torch.equal(tensor, other.tensors()[key]), (n, key)
        shared = {f"parts.{n}."}
        added = {k for k in more.tensors() if k not in less.tensors()}
        assert all(key.startswith(tuple(shared)) for key in added), "only the new block is added"


def test_error_falls_with_each_block_and_the_first_takes_off_most() -> None:
    weight, statistics = problem()
    errors = [1.0] + [
        error(weight, bitstack(weight, statistics, blocks=n, rank=4), statistics)
        for n in range(1, 7)
    ]
    gains = [a - b for a, b in pairwise(errors)]
    assert all(b < 0.7 * a for a, b in pairwise(errors)), errors
    assert gains == sorted(gains, reverse=True), "the order of the stack is that of significance"


def test_a_block_is_signs_times_the_best_low_rank_magnitudes() -> None:
    weight, _ = problem()
    code = bitstack(weight, Statistics(), blocks=1, rank=3)
    (part,) = code.parts
    assert isinstance(part, Signed)
    assert isinstance(part.inner, LowRank)
    assert torch.equal(part.decode() * weight >= 0, part.inner.decode() >= 0)
    left = torch.linalg.svdvals(weight.abs())[3:].norm()
    torch.testing.assert_close((weight - code.decode()).norm(), left, rtol=1e-3, atol=0)


def test_bytes_are_a_bit_a_weight_and_the_factors() -> None:
    weight, statistics = problem()
    for blocks, rank in ((1, 1), (2, 4), (3, 16)):
        code = bitstack(weight, statistics, blocks=blocks, rank=rank)
        assert code.nbytes == blocks * (64 * 15 + 2 * rank * (64 + 120))


def test_full_rank_restores_the_weight() -> None:
    weight, statistics = problem()
    code = bitstack(weight, statistics, blocks=1, rank=1000)
    assert float((code.decode() - weight).abs().max()) < 3e-3 * float(weight.abs().max())


def test_scaling_by_the_inputs_helps_where_they_differ() -> None:
    weight, statistics = problem()
    plain = bitstack(weight, Statistics(), blocks=2, rank=2)
    scaled = bitstack(weight, statistics, blocks=2, rank=2)
    assert error(weight, scaled, statistics) < error(weight, plain, statistics)


def test_silent_inputs_and_wrong_options() -> None:
    moment = torch.diag(torch.tensor([1.0, 0.0, 1e-12, 4.0]))
    code = bitstack(torch.randn(6, 4), Statistics(second_moment=moment), blocks=2, rank=2)
    assert bool(torch.isfinite(code.decode()).all())
    assert not bitstack(torch.zeros(6, 4), Statistics(), blocks=2, rank=1).decode().any()
    with pytest.raises(PliantError, match="blocks"):
        bitstack(torch.eye(4), Statistics(), blocks=0)


def test_a_recipe_can_ask_for_it_and_is_told_what_is_wrong() -> None:
    for blocks in (1, 3):
        RungSpec(method="bitstack", options={"blocks": blocks, "rank": 4}).check()
    with pytest.raises(RecipeError, match="blocks"):
        RungSpec(method="bitstack", options={"blocks": 0}).check()
