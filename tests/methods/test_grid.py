"""Grids: the searched range is never worse, the stored scale is the one that integers use."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pliant.methods.grid import Grid, fit_grid

torch.set_num_threads(1)


def rounded(weight: Tensor, grid: Grid) -> Tensor:
    """Nearest integers of `weight` on `grid`."""
    size = weight.shape[1] if grid.group_size <= 0 else grid.group_size
    member = torch.arange(weight.shape[1]) // size
    scales, zeros = grid.scales[:, member], grid.zeros[:, member]
    return torch.round(weight / scales + zeros).clamp(0, grid.top).to(torch.uint8)


def error(weight: Tensor, grid: Grid, importance: Tensor) -> float:
    decoded = grid.pack(rounded(weight, grid)).decode()
    return float(((decoded - weight).square() * importance).sum())


def heavy(out: int = 48, width: int = 96) -> Tensor:
    """Weights with heavy tails, so that clipping pays."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out, width, generator=generator)
    return weight * (1 + 3 * (torch.rand(out, width, generator=generator) > 0.98)) * 0.1


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_clipping_never_adds_weighted_error(bits: int, symmetric: bool) -> None:
    weight = heavy()
    importance = torch.rand(96, generator=torch.Generator().manual_seed(1)) ** 4
    plain, searched = (
        fit_grid(weight, bits, 32, symmetric=symmetric, importance=importance, clip=clip)
        for clip in (False, True)
    )
    # The search is over exact scales; storing them in 16 bits moves an error by 1e-3 at most.
    assert error(weight, searched, importance) <= 1.001 * error(weight, plain, importance)
    if bits in (2, 3):
        assert error(weight, searched, importance) < 0.9 * error(weight, plain, importance)


@pytest.mark.parametrize("scale_bits", [4, 6, 8, 16])
def test_scales_are_those_that_decoding_uses(scale_bits: int) -> None:
    weight = heavy()
    grid = fit_grid(weight, 3, 32, scale_bits=scale_bits)
    code = grid.pack(rounded(weight, grid))
    assert torch.equal(code.scales_as(), grid.scales)
    assert torch.equal(code.zeros_as(), grid.zeros)


def test_one_tile_or_many_give_the_same_grid() -> None:
    weight = heavy(out=700, width=1024)  # several tiles of rows
    whole = fit_grid(weight, 3, 64)
    for start in (0, 511, 512, 699):
        part = fit_grid(weight[start : start + 1], 3, 64)
        assert torch.equal(part.scales, whole.scales[start : start + 1])
        assert torch.equal(part.zeros, whole.zeros[start : start + 1])


@pytest.mark.parametrize("width", [1, 7, 65, 100])
def test_a_ragged_group_has_the_range_of_its_own_values(width: int) -> None:
    weight = heavy(width=width)
    weight[:, -1] = 5.0  # alone in its group when the width is 1 or 65
    grid = fit_grid(weight, 4, 32, clip=False)
    start = (width - 1) // 32 * 32
    alone = fit_grid(weight[:, start:].contiguous(), 4, 0, clip=False)
    assert torch.equal(grid.scales[:, -1:], alone.scales)
    assert torch.equal(grid.zeros[:, -1:], alone.zeros)


def test_zero_is_on_every_asymmetric_grid() -> None:
    grid = fit_grid(heavy() + 3.0, 4, 32)
    assert bool((grid.zeros == 0).all()), "all weights are positive: the range starts at 0"
    assert bool((fit_grid(heavy() - 3.0, 4, 32, clip=False).zeros == 15).all())


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [0.0, 1e-9, -0.7, 6e4])
def test_constant_weights_are_finite_and_near(bits: int, symmetric: bool, value: float) -> None:
    weight = torch.full((4, 40), value)
    grid = fit_grid(weight, bits, 16, symmetric=symmetric)
    decoded = grid.pack(rounded(weight, grid)).decode()
    assert bool(torch.isfinite(decoded).all())
    worst = 0.51 if bits > 1 or not symmetric else 1.01  # of the value; one bit has no exact level
    assert float((decoded - weight).abs().max()) <= worst * abs(value) + 1e-6


def test_channels_without_importance_do_not_decide() -> None:
    weight = heavy()
    importance = torch.ones(96)
    importance[0] = 0.0
    spoiled = weight.clone()
    spoiled[:, 0] = 1.0  # an outlier that no input ever reads
    clipped = fit_grid(spoiled, 3, 32, importance=importance)
    blind = fit_grid(spoiled, 3, 32)
    rest = importance
    assert error(spoiled, clipped, rest) < error(spoiled, blind, rest)
