"""ZeroQuant-FP: FP4 weights whose scales let a cast to FP8 be exact."""

from __future__ import annotations

from torch import Tensor

from pliant.codes import GroupLevels
from pliant.errors import PliantError
from pliant.methods.catalog import method
from pliant.methods.feedback import round_levels
from pliant.methods.levels import (
    LevelGrid,
    Scaling,
    channel_importance,
    fit_levels,
    minifloat_levels,
)
from pliant.observe.statistics import Statistics

PAPER = (
    "ZeroQuant-FP: A Leap Forward in LLMs Post-Training W4A8 Quantization Using "
    "Floating-Point Formats"
)
_CONSTRAINTS: dict[str, Scaling] = {"none": "free", "power": "power", "ratio": "ratio"}


@method("zeroquant_fp_rtn", kind="quantize", paper=PAPER)
def zeroquant_fp_rtn(
    weight: Tensor,  # [out, in]
    statistics: Statistics,
    *,
    group_size: int = 64,
    constraint: str = "ratio",
    scale_bits: int = 0,
    clip: bool = True,
) -> GroupLevels:
    """`zeroquant_fp` by round to nearest, without data."""
    return _fit(weight, statistics, group_size, constraint, scale_bits, clip).round(weight)


@method("zeroquant_fp", kind="quantize", paper=PAPER, needs=("second_moment",))
def zeroquant_fp(
    weight: Tensor,  # [out, in]
    statistics: Statistics,
    *,
    group_size: int = 64,
    constraint: str = "ratio",
    scale_bits: int = 0,
    clip: bool = True,
    act_order: bool = True,
    damp: float = 0.1,
) -> GroupLevels:
    """FP4 (e2m1) weights rounded as by GPTQ, their scales powers of two.

    constraint "power": each scale is 2^n. "ratio": it is 2^-n times a factor of the row, the
    paper's compute group. Either way the weights, divided by one number a matrix or a row, are
    e4m3 floats exactly, so an FP8 product needs no other scale. "none": scales are free. Exponents
    take `scale_bits`, 0 meaning 3 (8 octaves, all of which e4m3 holds), up to 8; free scales 16,
    or 4 to 8. The paper's low-rank compensation is `lorc` with base=zeroquant_fp. Cost: as
    `gptq`, with ten passes more to choose exponents. Source: Wu, Yao and He 2023.
    """
    grid = _fit(weight, statistics, group_size, constraint, scale_bits, clip)
    return round_levels(weight, statistics, grid, damp=damp, act_order=act_order)


def _fit(
    weight: Tensor,
    statistics: Statistics,
    group_size: int,
    constraint: str,
    scale_bits: int,
    clip: bool,
) -> LevelGrid:
    if constraint not in _CONSTRAINTS:
        known = ", ".join(_CONSTRAINTS)
        raise PliantError(f"constraint must be one of {known}, not {constraint!r}")
    return fit_levels(
        weight, minifloat_levels(2, 1)[None], group_size,
        importance=channel_importance(statistics), clip=clip,
        scaling=_CONSTRAINTS[constraint],
        scale_bits=scale_bits or (16 if constraint == "none" else 3),
    )  # fmt: skip
