"""Minifloats: 3 to 8 bits with a sign, an exponent and a mantissa, the split given or searched."""

from __future__ import annotations

from torch import Tensor

from pliant.codes import GroupLevels
from pliant.errors import PliantError
from pliant.methods.catalog import method
from pliant.methods.feedback import round_levels
from pliant.methods.levels import LevelGrid, channel_importance, fit_levels, minifloat_levels
from pliant.observe.statistics import Statistics

PAPER = "Post-Training Quantization with Low-precision Minifloats and Integers on FPGAs"


@method("minifloat", kind="quantize", paper=PAPER)
def minifloat(
    weight: Tensor,  # [out, in]
    statistics: Statistics,
    *,
    bits: int = 4,
    exponent: int = 0,
    group_size: int = 64,
    clip: bool = True,
    scale_bits: int = 16,
) -> GroupLevels:
    """Each weight to the nearest float of a few bits, times its group's searched scale.

    `exponent` bits of 1 to 5 leave the rest to the mantissa; 0 takes the split of least squared
    error for the whole matrix, inputs weighted by their mean square when it is known. One
    exponent bit is a uniform grid, so the search includes symmetric integers. Cost: a few passes
    for each clipping and each split. Source: Aggarwal et al.
    """
    grid = _fit(weight, statistics, bits, exponent, group_size, clip, scale_bits)
    return grid.round(weight)


@method("minifloat_gptq", kind="quantize", paper=PAPER, needs=("second_moment",))
def minifloat_gptq(
    weight: Tensor,  # [out, in]
    statistics: Statistics,
    *,
    bits: int = 4,
    exponent: int = 0,
    group_size: int = 64,
    clip: bool = True,
    scale_bits: int = 16,
    act_order: bool = True,
    damp: float = 0.1,
) -> GroupLevels:
    """`minifloat` rounded with GPTQ's error feedback; the split is searched by rounding."""
    grid = _fit(weight, statistics, bits, exponent, group_size, clip, scale_bits)
    return round_levels(weight, statistics, grid, damp=damp, act_order=act_order)


def _fit(
    weight: Tensor,
    statistics: Statistics,
    bits: int,
    exponent: int,
    group_size: int,
    clip: bool,
    scale_bits: int,
) -> LevelGrid:
    if not 3 <= bits <= 8 or not 0 <= exponent <= min(5, bits - 1):
        raise PliantError(
            f"a minifloat takes 3 to 8 bits, of which 1 to 5 are exponent (0: searched) and one "
            f"is the sign; not {bits} bits with {exponent}"
        )
    splits = [exponent] if exponent else range(1, min(5, bits - 1) + 1)
    grids = (
        fit_levels(
            weight, minifloat_levels(e, bits - 1 - e)[None], group_size,
            importance=channel_importance(statistics), clip=clip, scale_bits=scale_bits,
        )
        for e in splits
    )  # fmt: skip
    return min(grids, key=lambda grid: float(grid.loss))
