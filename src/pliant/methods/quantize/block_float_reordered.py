"""Block floating point with channel reordering: outlier channels share their blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from pliant.codes import Permuted
from pliant.errors import PliantError
from pliant.methods.catalog import method
from pliant.methods.feedback import round_levels
from pliant.methods.quantize.block_float import fit_blocks
from pliant.observe.statistics import Statistics

PAPER = "Accurate Block Quantization in LLMs with Outliers"


@method("block_float_reordered", kind="quantize", paper=PAPER, needs=("second_moment",))
def block_float_reordered(
    weight: Tensor,  # [out, in]
    statistics: Statistics,
    *,
    bits: int = 4,
    block_size: int = 16,
    by: str = "weight",
    element: str = "mantissa",
    exponent: int = 2,
    shared_bits: int = 5,
    clip: bool = True,
) -> Permuted:
    """`block_float` over input channels sorted by magnitude, so that outliers harm few others.

    A block is as coarse as its largest value; channels of like magnitude in a block leave the
    others their fine steps. by "weight" sorts by the mean square of each channel's weights, "input"
    by that of its inputs. The order is stored, 2 bytes an input, and gathers the activations.
    Exponents minimise the error weighted by the inputs' mean square. Cost: a few passes. Source:
    Trukhanov and Soloveychik 2024, who reorder what the KV cache stores.
    """
    order = channel_order(weight, statistics, by)
    sorted_weight = weight.index_select(1, order)
    importance = _moment(statistics).diagonal()[order]
    grid = fit_blocks(
        sorted_weight, bits, block_size, element, exponent, shared_bits, clip, importance
    )
    return Permuted.by(grid.round(sorted_weight), order)


@method("block_float_reordered_gptq", kind="quantize", paper=PAPER, needs=("second_moment",))
def block_float_reordered_gptq(
    weight: Tensor,  # [out, in]
    statistics: Statistics,
    *,
    bits: int = 4,
    block_size: int = 16,
    by: str = "weight",
    element: str = "mantissa",
    exponent: int = 2,
    shared_bits: int = 5,
    clip: bool = True,
    act_order: bool = True,
    damp: float = 0.1,
) -> Permuted:
    """`block_float_reordered` rounded with GPTQ's error feedback."""
    order = channel_order(weight, statistics, by)
    importance = _moment(statistics).diagonal()[order]
    grid = fit_blocks(
        weight.index_select(1, order), bits, block_size, element, exponent, shared_bits, clip,
        importance,
    )  # fmt: skip
    place = torch.argsort(order)
    inner = round_levels(weight, statistics, grid, damp=damp, act_order=act_order, place=place)
    return Permuted.by(inner, order)


def channel_order(weight: Tensor, statistics: Statistics, by: str) -> Tensor:
    """Input channels [in] by falling magnitude of their weights or of their inputs."""
    if by == "weight":
        magnitude = weight.float().square().mean(0)
    elif by == "input":
        magnitude = _moment(statistics).diagonal()
    else:
        raise PliantError(f"by must be weight or input, not {by!r}")
    return torch.argsort(magnitude, descending=True, stable=True)


def _moment(statistics: Statistics) -> Tensor:
    if statistics.second_moment is None:
        raise PliantError("reordering needs the second moment of the inputs; observe it first")
    return statistics.second_moment
