"""A search in one launch finds the scales, tables and zeros that torch's search finds.

Without a GPU it runs in Triton's interpreter; torch's runs on the CPU in either case.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from pliant.kernels import rounding
from pliant.kernels.triton import search
from pliant.methods import grid as grids
from pliant.methods import levels
from pliant.methods.grid import fit_grid
from pliant.methods.levels import fit_levels
from pliant.methods.quantize import shared_levels
from pliant.methods.quantize.shared_levels import first_tables

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(5, 70, 32), (3, 33, 16), (2, 130, 0), (40, 64, 64), (1, 1, 1), (9, 24, 7), (2, 300, 256)]


@pytest.fixture(params=[True, False], ids=["clip", "whole"])
def clip(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Everything is searched by the kernels under test."""
    monkeypatch.setattr(levels, "level_search", lambda device, size: search.search_levels)
    for module in (grids, shared_levels):
        monkeypatch.setattr(module, "gpu_search", lambda device, size: search)
    return monkeypatch


def in_torch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(levels, "level_search", lambda device, size: None)
    for module in (grids, shared_levels):
        patch.setattr(module, "gpu_search", lambda device, size: None)


def matrix(out: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """(weight [out, width], importance [width]): also a zero row, a constant one, a lone peak."""
    generator = torch.Generator().manual_seed(out * width)
    weight = torch.randn(out, width, generator=generator) * 0.1
    weight[-1] = 0.0
    if out > 2:
        weight[1] = -0.3
        weight[2, ::5] *= 30.0
    return weight.to(dtype), torch.rand(width, generator=generator) + 0.01


def grouped(weight: Tensor, importance: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(weight [out, groups, size], importance [1, groups, size]), padded as torch's search is."""
    extra = -weight.shape[1] % size
    padded = torch.cat([weight, weight[:, -1:].expand(-1, extra)], 1).float()
    costs = torch.nn.functional.pad(importance, (0, extra))
    return padded.unflatten(1, (-1, size)), costs.view(1, -1, size)


def assert_as_good(found: Tensor, expected: Tensor, same: Tensor) -> None:
    """Losses differ by no more than rounding, and only where another candidate was taken.

    Which one is taken is compared where a loss is left: several fit a group of one value exactly.
    """
    spare = 1e-5 * expected + 1e-12
    assert bool((found <= expected + spare).all())
    assert bool((same | ((found - expected).abs() <= spare)).all())
    assert same[expected > 1e-12].float().sum() >= 0.9 * (expected > 1e-12).sum()


@pytest.mark.parametrize(("out", "width", "size"), SHAPES)
@pytest.mark.parametrize(("bits", "tables"), [(1, 2), (2, 4), (3, 1), (4, 3)])
def test_levels(out: int, width: int, size: int, bits: int, tables: int, clip: bool) -> None:
    weight, importance = matrix(out, width)
    compare_levels(weight, importance, first_tables(bits, tables), size or width, clip)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [3, 6])
def test_levels_of_half_weights(dtype: torch.dtype, bits: int) -> None:
    weight, importance = matrix(6, 200, dtype)
    compare_levels(weight, importance, first_tables(bits, 2), 64, True)


def test_levels_whose_number_is_no_power_of_two() -> None:
    weight, importance = matrix(6, 200)
    compare_levels(weight, importance, torch.tensor([[-2.0, -0.3, 0.4, 1.0, 1.6]]), 32, True)


def compare_levels(
    weight: Tensor, importance: Tensor, tables: Tensor, size: int, clip: bool
) -> None:
    tables, bits = levels.stored_tables(tables), (tables.shape[1] - 1).bit_length()
    groups, costs = grouped(weight, importance, size)
    shares = grids.clip_shares(bits, clip)
    loss, scale, selector = (
        found.cpu()
        for found in search.search_levels(
            weight.to(DEVICE), tables.to(DEVICE), importance.to(DEVICE), size, shares, levels.TINY
        )
    )
    expected = levels._search(groups, tables, costs, bits, clip)
    assert selector.dtype == torch.int64

    def exact(scale: Tensor, selector: Tensor) -> Tensor:
        x, of = groups.double() / scale.double()[..., None], tables.double()[selector]
        middles = ((of[..., 1:] + of[..., :-1]) / 2).contiguous()
        left = of.gather(-1, torch.searchsorted(middles, x)) - x
        return (left * scale.double()[..., None]).square().mul(costs).sum(-1)

    same = torch.isclose(scale, expected[1], rtol=1e-6, atol=0.0) & (selector == expected[2])
    assert_as_good(exact(scale, selector), exact(*expected[1:]), same)
    torch.testing.assert_close(loss, expected[0], rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize(("bits", "tables"), [(2, 4), (4, 1)])
def test_a_fit_is_torchs(bits: int, tables: int, launched: pytest.MonkeyPatch) -> None:
    weight, importance = matrix(6, 200)
    table = first_tables(bits, tables)
    found = fit_levels(weight.to(DEVICE), table, 64, importance=importance.to(DEVICE), scale_bits=6)
    integers = fit_grid(weight.to(DEVICE), bits, 64, importance=importance.to(DEVICE), scale_bits=6)
    in_torch(launched)
    expected = fit_levels(weight, table, 64, importance=importance, scale_bits=6)
    assert float(found.loss) == pytest.approx(float(expected.loss), rel=1e-5)
    varied = [0, 2, 3, 4]  # of a row of one value several scales leave nothing
    assert (found.scales.cpu()[varied] == expected.scales[varied]).float().mean() > 0.9
    assert (found.selector is None) == (tables == 1)
    # To nearest with these scales: what they make of the weights is the same.
    ours, theirs = (g.round(weight.to(d)) for g, d in ((found, DEVICE), (expected, "cpu")))
    assert (ours.decode().cpu()[varied] == theirs.decode()[varied]).float().mean() > 0.9
    other = fit_grid(weight, bits, 64, importance=importance, scale_bits=6)
    assert (integers.scales.cpu() == other.scales).float().mean() > 0.9
    assert (integers.zeros.cpu() == other.zeros).float().mean() > 0.9


@pytest.mark.parametrize(("out", "width", "size"), SHAPES)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_integers(out: int, width: int, size: int, bits: int, symmetric: bool, clip: bool) -> None:
    weight, importance = matrix(out, width)
    compare_integers(weight, importance, bits, size or width, symmetric, clip)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [False, True])
def test_integers_of_half_weights(dtype: torch.dtype, symmetric: bool) -> None:
    weight, importance = matrix(6, 200, dtype)
    compare_integers(weight, importance, 4, 128, symmetric, True)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_zero_between_two_integers_is_torchs(bits: int) -> None:
    weight = torch.linspace(-1, 1, 32)[None] * torch.tensor([1.0, 0.5, 3.0, 0.7])[:, None]
    compare_integers(weight, torch.ones(32), bits, 32, False, False)


def compare_integers(
    weight: Tensor, importance: Tensor, bits: int, size: int, symmetric: bool, clip: bool
) -> None:
    groups, costs = grouped(weight, importance, size)
    shares = grids.clip_shares(bits, clip)
    scale, zero = (
        found.cpu()
        for found in search.search_grid(
            weight.to(DEVICE), bits, symmetric, importance.to(DEVICE), size, shares
        )
    )
    expected = grids._fit_tile(groups, bits, symmetric, costs, shares)

    def exact(scale: Tensor, zero: Tensor) -> Tensor:
        s, z = scale.double()[..., None], zero.double()[..., None]
        near = ((groups / s + z).round().clamp(0, 2**bits - 1) - z) * s
        return (near - groups).square().mul(costs).sum(-1)

    # One candidate is the same number in both, so no rounding is to be allowed for.
    same = (scale == expected[0]) & (zero == expected[1])
    assert_as_good(exact(scale, zero), exact(*expected), same)
    assert clip or bool(same.all())


def test_rows_that_are_apart_and_columns_that_are_not_next_to_each_other() -> None:
    weight, importance = matrix(8, 48)
    for view in (weight[::3], weight.t()[:, :5], weight[:, 7:40]):
        width = view.shape[1]
        apart = torch.empty_strided(view.shape, view.stride(), device=DEVICE).copy_(view)
        given = importance[:width].to(DEVICE)
        whole = view.contiguous().to(DEVICE)
        for one, other in zip(
            search.search_grid(apart, 3, False, given, 16, [1.0, 0.8]),
            search.search_grid(whole, 3, False, given, 16, [1.0, 0.8]),
            strict=True,
        ):
            assert torch.equal(one, other)


@pytest.mark.parametrize(("out", "width", "size"), [(12, 100, 32), (6, 64, 0)])
@pytest.mark.parametrize(("bits", "count"), [(1, 1), (2, 4), (3, 2), (4, 4), (5, 2)])
@pytest.mark.parametrize("flat", [False, True])
def test_tables_are_learned_as_torch_learns_them(
    out: int, width: int, size: int, bits: int, count: int, flat: bool,
    launched: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(width)
    weight, importance = torch.randn(out, width, generator=generator), matrix(out, width)[1]
    weight = weight + 0.6 * weight.square()  # no constant rows: any table is as good for these
    given = None if flat else importance
    there = None if given is None else given.to(DEVICE)
    found = shared_levels.learn_tables(weight.to(DEVICE), there, bits, size, count, 3).cpu()
    in_torch(launched)
    expected = shared_levels.learn_tables(weight, given, bits, size, count, 3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    moved = (expected - first_tables(bits, count)).abs().amax()
    assert moved > 1e-3


def test_a_group_too_long_for_a_program_is_left_to_torch() -> None:
    gpu = torch.device("cuda")
    assert rounding.level_search(gpu, search.LONGEST) is search.search_levels
    assert rounding.level_search(gpu, search.LONGEST + 1) is None
    assert rounding.gpu_search(gpu, search.LONGEST + 1) is None
    assert rounding.gpu_search(torch.device("cpu"), 64) is None
    weight = torch.zeros(1, search.LONGEST + 1)
    with pytest.raises(ValueError, match="groups of 1 to"):
        search.search_grid(weight, 4, False, weight[0], search.LONGEST + 1, [1.0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="2**31 values need a GPU's memory")
def test_values_beyond_what_32_bits_address() -> None:
    weight, importance = matrix(3, 64)
    far = torch.empty(2**31 + 2**10, dtype=torch.bfloat16, device=DEVICE)
    rows = far.as_strided((3, 64), (2**30, 1))
    rows.copy_(weight)
    given = importance.to(DEVICE)
    near = rows.contiguous()
    for one, other in zip(
        search.search_grid(rows, 4, False, given, 32, [1.0, 0.9]),
        search.search_grid(near, 4, False, given, 32, [1.0, 0.9]),
        strict=True,
    ):
        assert torch.equal(one, other)
