"""Tables of levels are what their formats say, and grids of them are fitted without loss."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pliant.errors import PliantError
from pliant.methods.levels import (
    LevelGrid,
    byte_tables,
    fit_levels,
    integer_levels,
    minifloat_levels,
)

torch.set_num_threads(1)

SPLITS = [(e, m) for e in range(1, 6) for m in range(8 - e)]


def pattern_value(pattern: int, exponent: int, mantissa: int) -> Fraction:
    """One bit pattern by the definition of a float without infinities."""
    sign = pattern >> (exponent + mantissa) & 1
    e = pattern >> mantissa & (2**exponent - 1)
    m = pattern & (2**mantissa - 1)
    bias = 2 ** (exponent - 1) - 1
    significand = Fraction(m, 2**mantissa) + (1 if e else 0)
    return (-1) ** sign * significand * Fraction(2) ** (max(e, 1) - bias)


@pytest.mark.parametrize(("exponent", "mantissa"), SPLITS)
def test_minifloats_are_all_their_bit_patterns(exponent: int, mantissa: int) -> None:
    bits = 1 + exponent + mantissa
    expected = sorted(pattern_value(p, exponent, mantissa) for p in range(2**bits))
    levels = minifloat_levels(exponent, mantissa)
    factor = Fraction(float(levels[-1])) / expected[-1]
    assert math.log2(factor) == round(math.log2(factor)), "a power of two"
    assert [Fraction(v) for v in levels.tolist()] == [v * factor for v in expected]
    assert torch.equal(levels.half().float(), levels), "fp16 stores them exactly"
    assert int((levels == 0).sum()) == 2


def test_minifloats_are_those_of_the_standards() -> None:
    assert minifloat_levels(2, 1)[8:].tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert minifloat_levels(2, 0)[4:].tolist() == [0, 1, 2, 4]
    patterns = torch.arange(256, dtype=torch.uint8)
    for dtype, split in ((torch.float8_e4m3fn, (4, 3)), (torch.float8_e5m2, (5, 2))):
        known = patterns.view(dtype).float()
        known = known[torch.isfinite(known)].sort().values
        ours = minifloat_levels(*split)
        least = known[known > 0].min() / ours[ours > 0].min()
        ours = ours * least
        # Theirs lack the patterns of not-a-number and infinity, the outermost ones.
        missing = (len(ours) - len(known)) // 2
        assert torch.equal(ours[missing : len(ours) - missing], known)


def test_minifloats_of_no_format_are_refused() -> None:
    for split in ((0, 3), (6, 1), (2, -1), (5, 3)):
        with pytest.raises(PliantError, match="minifloat"):
            minifloat_levels(*split)


def test_integers_are_symmetric_with_zero_twice() -> None:
    assert integer_levels(3).tolist() == [-3, -2, -1, 0, 0, 1, 2, 3]
    assert len(integer_levels(8)) == 256


def heavy(out: int = 48, width: int = 96) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out, width, generator=generator)
    return weight * (1 + 3 * (torch.rand(out, width, generator=generator) > 0.98)) * 0.1


def error(weight: Tensor, grid: LevelGrid, importance: Tensor) -> float:
    return float(((grid.round(weight).decode() - weight).square() * importance).sum())


TABLES = torch.tensor([[-4.0, -2, -1, 0, 1, 2, 3, 4], [-6, -4, -2, -1, 0, 1, 2, 4]])


@pytest.mark.parametrize("tables", [TABLES, TABLES[:1], integer_levels(4)[None]])
@pytest.mark.parametrize("scaling", ["free", "power", "ratio"])
@pytest.mark.parametrize("group_size", [0, 7, 32])
def test_every_weight_gets_its_nearest_level(tables: Tensor, scaling, group_size: int) -> None:
    weight = heavy(width=65)
    scale_bits = 16 if scaling == "free" else 4
    grid = fit_levels(weight, tables, group_size, scaling=scaling, scale_bits=scale_bits)
    code = grid.round(weight)
    member = torch.arange(65) // grid.group_size
    assert torch.equal(code.scales_as(), grid.scales)
    levels = code.tables.float()[code.selected().long()] * grid.scales[..., None]
    distance = (weight[..., None] - levels[:, member]).abs().amin(-1)
    torch.testing.assert_close((code.decode() - weight).abs(), distance, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("scaling", ["free", "power", "ratio"])
@pytest.mark.parametrize("levels", [integer_levels(3), minifloat_levels(2, 1)])
def test_clipping_never_adds_weighted_error(levels: Tensor, scaling) -> None:
    weight = heavy()
    importance = torch.rand(96, generator=torch.Generator().manual_seed(1)) ** 4
    scale_bits = 16 if scaling == "free" else 8
    plain, searched = (
        fit_levels(
            weight, levels[None], 32,
            importance=importance, clip=clip, scaling=scaling, scale_bits=scale_bits,
        )
        for clip in (False, True)
    )  # fmt: skip
    found = error(weight, searched, importance)
    assert found <= 1.001 * error(weight, plain, importance)
    assert searched.loss == pytest.approx(found, rel=2e-3), "fp16 moves the free scales a little"


def test_without_clipping_nothing_saturates() -> None:
    weight = heavy()
    for scaling, scale_bits in (("free", 16), ("power", 8), ("ratio", 8)):
        grid = fit_levels(
            weight, TABLES[1:], 32, clip=False, scaling=scaling, scale_bits=scale_bits
        )
        reach = grid.scales.repeat_interleave(32, 1) * 1.001
        assert bool((weight <= 4 * reach).all())
        assert bool((weight >= -6 * reach).all())


def test_of_two_tables_each_group_takes_the_better() -> None:
    weight = heavy()
    importance = torch.rand(96, generator=torch.Generator().manual_seed(1)) + 0.1
    options = {"importance": importance}
    both = fit_levels(weight, TABLES, 32, **options)
    alone = [fit_levels(weight, TABLES[i : i + 1], 32, **options) for i in (0, 1)]
    losses = torch.stack(
        [
            ((grid.round(weight).decode() - weight).square() * importance).view(48, 3, 32).sum(-1)
            for grid in (*alone, both)
        ]
    )
    assert both.selector is not None
    assert 0 < int(both.selector.sum()) < both.selector.numel(), "each is best somewhere"
    assert bool((losses[2] <= losses[:2].amin(0) * 1.01).all())
    assert both.loss < 0.97 * min(grid.loss for grid in alone)


@pytest.mark.parametrize("scale_bits", [1, 3, 8])
def test_constrained_scales_are_powers_of_two(scale_bits: int) -> None:
    weight = heavy() * torch.logspace(-2, 1, 48)[:, None]
    power = fit_levels(weight, TABLES[:1], 16, scaling="power", scale_bits=scale_bits)
    assert bool((power.scales.frexp().mantissa == 0.5).all())
    ratio = fit_levels(weight, TABLES[:1], 16, scaling="ratio", scale_bits=scale_bits)
    relative = ratio.scales / ratio.scales[:, :1]
    assert bool((relative.frexp().mantissa == 0.5).all())
    octaves = ratio.scales.amax(1) / ratio.scales.amin(1)
    assert bool((octaves <= 2.0 ** (2**scale_bits - 1)).all())
    assert ratio.loss <= power.loss * 1.001


def test_one_tile_or_many_give_the_same_grid() -> None:
    weight = heavy(out=700, width=1024)
    whole = fit_levels(weight, TABLES, 64)
    assert whole.selector is not None
    for start in (0, 511, 512, 699):
        part = fit_levels(weight[start : start + 1], TABLES, 64)
        assert torch.equal(part.scales, whole.scales[start : start + 1])
        assert torch.equal(part.selector, whole.selector[start : start + 1])


@pytest.mark.parametrize("value", [0.0, 1e-9, -0.7, 6e4])
@pytest.mark.parametrize("scaling", ["free", "power", "ratio"])
def test_constant_weights_are_finite_and_near(value: float, scaling) -> None:
    weight = torch.full((4, 40), value)
    bits = 16 if scaling == "free" else 8
    decoded = fit_levels(weight, TABLES, 16, scaling=scaling, scale_bits=bits).round(weight)
    assert bool(torch.isfinite(decoded.decode()).all())
    assert float((decoded.decode() - weight).abs().max()) <= 0.34 * abs(value) + 1e-6


def test_an_unknown_scaling_is_refused() -> None:
    with pytest.raises(PliantError, match="scaling"):
        fit_levels(heavy(), TABLES, 16, scaling="none")  # type: ignore[arg-type]


@given(
    count=st.integers(1, 4),
    bits=st.integers(1, 5),
    lean=st.floats(-3, 3),
    size=st.sampled_from([1e-4, 1.0, 300.0]),
    seed=st.integers(0, 100),
)
def test_byte_tables_are_8_bit_integers_in_the_shape_of_those_given(
    count: int, bits: int, lean: float, size: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    original = (torch.randn(count, 2**bits, generator=generator) + lean).sort(1).values * size
    tables = byte_tables(original)
    assert torch.equal(tables, tables.half().float())
    whole = tables * 128
    assert torch.equal(whole, whole.round())
    assert whole.abs().max() <= 127
    assert (whole.diff(dim=1) >= 0).all()
    assert (whole[:, 0] < 0).all()
    assert (whole[:, -1] > 0).all()
    for table, wanted in zip(whole, original, strict=True):
        if wanted[0] < 0 < wanted[-1]:
            halves = table.view(2, -1)
            assert (halves[:, -1] - halves[:, 0]).max() <= 127
            unit = (table @ wanted) / (wanted @ wanted)
            assert (table - unit * wanted).abs().max() <= 1.1
