"""BitMoD: each group takes the one of several small float types that fits it best."""

from __future__ import annotations

import torch
from torch import Tensor

from pliant.codes import GroupLevels
from pliant.errors import PliantError
from pliant.methods.catalog import method
from pliant.methods.feedback import round_levels
from pliant.methods.levels import LevelGrid, channel_importance, fit_levels
from pliant.observe.statistics import Statistics

PAPER = "BitMoD: Bit-serial Mixture-of-Datatype LLM Acceleration"
# What the pattern of a negative zero stands for: a level between the two largest, or beyond them.
_MAGNITUDES = {3: (1.0, 2.0, 4.0), 4: (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)}
_SPECIAL = {3: (-3.0, 3.0, -6.0, 6.0), 4: (-5.0, 5.0, -8.0, 8.0)}


@method("bitmod", kind="quantize", paper=PAPER)
def bitmod(
    weight: Tensor,  # [out, in]
    statistics: Statistics,
    *,
    bits: int = 4,
    group_size: int = 128,
    clip: bool = True,
    scale_bits: int = 8,
) -> GroupLevels:
    """FP3 or FP4 groups, each with one of four special values in the place of negative zero.

    FP3 is 0, 1, 2, 4 with a sign and takes -3, 3, -6 or 6; FP4 (e2m1) takes -5, 5, -8 or 8. The
    first two add resolution, the last two add range on one side. Two bits a group select; scales
    are 8-bit integers of a row's factor, as in the paper, which does not clip. Type and scale
    have the least squared error, inputs weighted by their mean square when it is known. Cost: a
    few passes for each type and clipping. Source: Chen et al. 2024.
    """
    return _fit(weight, statistics, bits, group_size, clip, scale_bits).round(weight)


@method("bitmod_gptq", kind="quantize", paper=PAPER, needs=("second_moment",))
def bitmod_gptq(
    weight: Tensor,  # [out, in]
    statistics: Statistics,
    *,
    bits: int = 4,
    group_size: int = 128,
    clip: bool = True,
    scale_bits: int = 8,
    act_order: bool = True,
    damp: float = 0.1,
) -> GroupLevels:
    """`bitmod` rounded with GPTQ's error feedback, types and scales chosen beforehand."""
    grid = _fit(weight, statistics, bits, group_size, clip, scale_bits)
    return round_levels(weight, statistics, grid, damp=damp, act_order=act_order)


def _fit(
    weight: Tensor, statistics: Statistics, bits: int, group_size: int, clip: bool, scale_bits: int
) -> LevelGrid:
    return fit_levels(
        weight, data_types(bits), group_size,
        importance=channel_importance(statistics), clip=clip, scale_bits=scale_bits,
    )  # fmt: skip


def data_types(bits: int) -> Tensor:
    """The four types, rising levels [4, 2**bits]."""
    if bits not in _MAGNITUDES:
        raise PliantError(f"bitmod takes 3 or 4 bits, not {bits}")
    magnitudes = torch.tensor(_MAGNITUDES[bits])
    basic = torch.cat([-magnitudes, torch.zeros(1), magnitudes])
    special = torch.tensor(_SPECIAL[bits])[:, None]
    return torch.cat([basic.expand(len(special), -1), special], 1).sort(1).values
