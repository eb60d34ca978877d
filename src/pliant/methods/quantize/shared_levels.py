"""Shared levels: a few tables of levels learned for a matrix; each group takes one and a scale."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from pliant.codes import GroupLevels
from pliant.errors import PliantError
from pliant.kernels.rounding import gpu_search
from pliant.methods.catalog import method
from pliant.methods.feedback import round_levels
from pliant.methods.grid import clip_shares
from pliant.methods.levels import (
    TINY,
    LevelGrid,
    byte_scaled,
    byte_tables,
    channel_importance,
    fit_levels,
    stored_tables,
)
from pliant.observe.statistics import Statistics

PAPER = (
    "BitMoD: Bit-serial Mixture-of-Datatype LLM Acceleration (a type for each group); here the "
    "types are learned, as in Least Squares Quantization in PCM"
)
_SAMPLE = 1 << 17  # weights that tables are learned on: four times as many gain nothing
_BYTE_BITS = 4  # of indices up to which levels are 8-bit integers; 0.6% more squared error at 4


@method("shared_levels", kind="quantize", paper=PAPER, needs=("second_moment",))
def shared_levels(
    weight: Tensor,  # [out, in]
    statistics: Statistics,
    *,
    bits: int = 3,
    group_size: int = 64,
    tables: int = 4,
    iterations: int = 6,
    scale_bits: int = 6,
    clip: bool = True,
    feedback: bool = True,
    act_order: bool = True,
    damp: float = 0.1,
) -> GroupLevels:
    """Integers into one of `tables` tables of 2**bits levels, a selector and a scale a group.

    Lloyd's algorithm in which a cell is a whole group: each takes the table and the scale of
    least squared error, inputs weighted by their mean square; each level moves to the weighted
    mean of what it stands for. The start is a normal distribution's quantiles, symmetric and
    leaning to either side. Then rounding with GPTQ's error feedback (`feedback`). Up to 4 bits,
    levels are integers of 8 bits times a common unit: a kernel multiplies them as one digit.
    Tables cost 2 * tables * 2**bits bytes a matrix. Cost: `iterations` searches as `bitmod` does.
    """
    if not 1 <= tables <= 256 or not 1 <= bits <= 6:
        raise PliantError(
            f"shared_levels takes 1 to 6 bits and 1 to 256 tables, not {bits} and {tables}"
        )
    learned = learn_tables(
        weight, channel_importance(statistics), bits, group_size, tables, iterations, clip
    )
    grid = fit_levels(
        weight, learned, group_size,
        importance=channel_importance(statistics), clip=clip, scale_bits=scale_bits,
    )  # fmt: skip
    if not feedback:
        return grid.round(weight)
    return round_levels(weight, statistics, grid, damp=damp, act_order=act_order)


def learn_tables(
    weight: Tensor,
    importance: Tensor | None,  # [in]
    bits: int,
    group_size: int,
    count: int,
    iterations: int,
    clip: bool = True,
) -> Tensor:
    """[count, 2**bits] rising levels, learned on evenly spaced rows of `weight` [out, in].

    They are what is stored: `byte_tables` up to 4 bits. Groups are fitted to those while levels
    move by what lies nearest before rounding, which small moves would else not get beyond.
    """
    out, width = weight.shape
    step = max(1, out * width // _SAMPLE)
    sample = weight[::step].float()
    found = byte_scaled(_start(bits, count, weight.device))
    size = width if group_size <= 0 else min(group_size, width)
    search = gpu_search(weight.device, size)
    given = weight.new_ones(width) if importance is None else importance
    store = byte_tables if bits <= _BYTE_BITS else stored_tables
    if search is not None:
        return search.learn_levels(
            sample, found, store(found), given, size, clip_shares(bits, clip), TINY,
            iterations, bits <= _BYTE_BITS,
        )  # fmt: skip
    for _ in range(iterations):
        grid = fit_levels(sample, store(found), group_size, importance=importance, clip=clip)
        found = byte_scaled(_moved(sample, importance, grid, found))
    return store(found)


def first_tables(bits: int, count: int) -> Tensor:
    """Quantiles of a normal distribution, a symmetric table first, then leaning more and more."""
    shares = (torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits
    levels = torch.special.ndtri(shares)
    levels = levels / levels.abs().max()
    found = []
    for number in range(count):
        lean = 0.35 * ((number + 1) // 2) / max(1, count // 2) * (-1) ** number
        # One side keeps its range, the other is drawn in: levels come closer together there.
        found.append(torch.where(levels * lean > 0, levels, levels * (1 - abs(lean))) + lean / 8)
    return torch.stack(found).float()


@lru_cache(maxsize=64)
def _start(bits: int, count: int, device: torch.device) -> Tensor:
    """`first_tables` on a device. Kept: copying to a GPU waits for all that it has yet to do."""
    return first_tables(bits, count).to(device)


def _moved(sample: Tensor, importance: Tensor | None, grid: LevelGrid, tables: Tensor) -> Tensor:
    """Each level at the weighted mean of the values, over their scale, that it stands for."""
    out, width = sample.shape
    size, groups = grid.group_size, grid.scales.shape[1]
    extra = -width % size
    x = pad(sample, (0, extra)).view(out, groups, size) / grid.scales[..., None].clamp_min(1e-12)
    weight = torch.ones(width, device=sample.device) if importance is None else importance.float()
    cost = pad(weight, (0, extra)).view(1, groups, size) * grid.scales[..., None].square()
    table = grid.selector if grid.selector is not None else torch.zeros_like(grid.scales).long()
    middles = ((tables[:, 1:] + tables[:, :-1]) / 2)[table]
    place = torch.searchsorted(middles.contiguous(), x) + table[..., None] * tables.shape[1]
    place = place.flatten()
    mass = torch.zeros(tables.numel(), device=sample.device, dtype=torch.float64)
    first = torch.zeros_like(mass)
    mass.index_add_(0, place, cost.expand_as(x).flatten().double())
    first.index_add_(0, place, (cost * x).flatten().double())
    mass, first = mass.view_as(tables), first.view_as(tables)
    moved = torch.where(mass > 0, first / mass.clamp_min(1e-300), tables.double())
    return moved.float().sort(1).values
