"""Block arithmetic: blocks of small numbers that share an exponent, chosen without any data."""

from __future__ import annotations

from torch import Tensor

from pliant.codes import GroupLevels
from pliant.errors import PliantError
from pliant.methods.catalog import method
from pliant.methods.feedback import round_levels
from pliant.methods.levels import LevelGrid, fit_levels, integer_levels, minifloat_levels
from pliant.observe.statistics import Statistics

PAPER = "Revisiting Block-based Quantisation: What is Important for Sub-8-bit LLM Inference?"
ELEMENTS = ("mantissa", "minifloat", "log")


@method("block_float", kind="quantize", paper=PAPER)
def block_float(
    weight: Tensor,  # [out, in]
    statistics: Statistics,
    *,
    bits: int = 4,
    block_size: int = 16,
    element: str = "mantissa",
    exponent: int = 2,
    shared_bits: int = 5,
    clip: bool = True,
) -> GroupLevels:
    """Blocks of `block_size` inputs with one exponent of `shared_bits` bits, no calibration.

    element "mantissa": block floating point, `bits` of sign and magnitude. "minifloat": block
    minifloat, each element a float with `exponent` bits of its own. "log": block logarithm, sign
    and exponent only. `clip` takes the power of two below where saturating costs less squared
    error than coarser steps. Exponents reach 2**shared_bits octaves below the matrix's largest;
    8 is one byte as in MX formats. Cost: a few passes. Source: Zhang et al. 2023.
    """
    grid = fit_blocks(weight, bits, block_size, element, exponent, shared_bits, clip, None)
    return grid.round(weight)


@method("block_float_gptq", kind="quantize", paper=PAPER, needs=("second_moment",))
def block_float_gptq(
    weight: Tensor,  # [out, in]
    statistics: Statistics,
    *,
    bits: int = 4,
    block_size: int = 16,
    element: str = "mantissa",
    exponent: int = 2,
    shared_bits: int = 5,
    clip: bool = True,
    act_order: bool = True,
    damp: float = 0.1,
) -> GroupLevels:
    """`block_float` rounded with GPTQ's error feedback: the format alone stays data-free."""
    grid = fit_blocks(weight, bits, block_size, element, exponent, shared_bits, clip, None)
    return round_levels(weight, statistics, grid, damp=damp, act_order=act_order)


def fit_blocks(
    weight: Tensor,  # [out, in]
    bits: int,
    block_size: int,
    element: str,
    exponent: int,
    shared_bits: int,
    clip: bool,
    importance: Tensor | None,  # [in]
) -> LevelGrid:
    """The grid of every block: the elements' levels times a power of two."""
    levels = element_levels(bits, element, exponent)[None]
    return fit_levels(
        weight, levels, block_size,
        importance=importance, clip=clip, scaling="power", scale_bits=shared_bits,
    )  # fmt: skip


def element_levels(bits: int, element: str, exponent: int = 2) -> Tensor:
    """[2**bits] rising values of an element under a shared exponent of 0."""
    if not 2 <= bits <= 8:
        raise PliantError(f"an element takes 2 to 8 bits, not {bits}")
    if element == "mantissa":
        return integer_levels(bits)
    if element == "minifloat":
        return minifloat_levels(exponent, bits - 1 - exponent)
    if element == "log":
        return minifloat_levels(bits - 1, 0)
    raise PliantError(f"element must be one of {', '.join(ELEMENTS)}, not {element!r}")
