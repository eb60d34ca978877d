"""k-bit inference scaling laws: bits, block size and data type, blocks scaled by their largest."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from pliant.codes import GroupLevels
from pliant.errors import PliantError
from pliant.methods.catalog import method
from pliant.methods.feedback import round_levels
from pliant.methods.levels import LevelGrid, fit_levels, integer_levels, minifloat_levels
from pliant.observe.statistics import Statistics

PAPER = "The case for 4-bit precision: k-bit Inference Scaling Laws"
DATA_TYPES = ("int", "float", "quantile", "dynamic")
_SAMPLE = 1 << 20  # weights whose quantiles stand for the matrix's


@method("kbit", kind="quantize", paper=PAPER)
def kbit(
    weight: Tensor,  # [out, in]
    statistics: Statistics,
    *,
    bits: int = 4,
    data_type: str = "float",
    group_size: int = 64,
    exponent: int = 2,
    scale_bits: int = 16,
) -> GroupLevels:
    """Round to nearest in a data type of `bits` bits, each block scaled by its largest |w|.

    data_type "int": symmetric integers. "float": `exponent` bits of 1 to 5, the rest mantissa.
    "quantile": levels between which lie equally many of the matrix's own scaled weights.
    "dynamic": after the sign, leading zeros are a decimal exponent and what follows the first one
    is a fraction. Zero-shot: no data, no search of a range. Cost: one pass; quantile sorts a
    sample of the weights. Source: Dettmers and Zettlemoyer 2022.
    """
    return _fit(weight, bits, data_type, group_size, exponent, scale_bits).round(weight)


@method("kbit_gptq", kind="quantize", paper=PAPER, needs=("second_moment",))
def kbit_gptq(
    weight: Tensor,  # [out, in]
    statistics: Statistics,
    *,
    bits: int = 4,
    data_type: str = "float",
    group_size: int = 64,
    exponent: int = 2,
    scale_bits: int = 16,
    act_order: bool = True,
    damp: float = 0.1,
) -> GroupLevels:
    """`kbit` rounded with GPTQ's error feedback, which the paper leaves to others."""
    grid = _fit(weight, bits, data_type, group_size, exponent, scale_bits)
    return round_levels(weight, statistics, grid, damp=damp, act_order=act_order)


def _fit(
    weight: Tensor, bits: int, data_type: str, group_size: int, exponent: int, scale_bits: int
) -> LevelGrid:
    if not 2 <= bits <= 8:
        raise PliantError(f"kbit takes 2 to 8 bits, not {bits}")
    if data_type not in DATA_TYPES:
        raise PliantError(f"data_type must be one of {', '.join(DATA_TYPES)}, not {data_type!r}")
    if data_type == "int":
        levels = integer_levels(bits)
    elif data_type == "float":
        exponent = min(exponent, 1) if bits == 2 else exponent
        levels = minifloat_levels(exponent, bits - 1 - exponent)
    elif data_type == "dynamic":
        levels = dynamic_levels(bits)
    else:
        levels = quantile_levels(weight, bits, group_size)
    return fit_levels(weight, levels[None], group_size, clip=False, scale_bits=scale_bits)


def dynamic_levels(bits: int) -> Tensor:
    """[2**bits] rising: sign, then n zeros, a one and f = bits - 2 - n bits of a fraction.

    A pattern is worth 10^-n times the middle of its f-bit slice of 0.1 .. 1. All zeros is 0, and
    the pattern of a negative zero is 1, so that the largest weight of a block is exact.
    """
    positive = []
    for zeros in range(bits - 1):
        edges = torch.linspace(0.1, 1.0, 2 ** (bits - 2 - zeros) + 1)
        positive.append((edges[1:] + edges[:-1]) / 2 * 10.0**-zeros)
    values = torch.cat(positive)
    return torch.cat([values, -values, torch.tensor([0.0, 1.0])]).sort().values


def quantile_levels(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """[2**bits] rising levels in -1 .. 1 that equally many block-scaled weights are near to.

    Level i is the mean of the quantiles i and i + 1 of 2^bits + 1, all of them stretched so that
    the outer ones reach -1 and 1, where each block has its largest weight.
    """
    out, width = weight.shape
    size = max(width, 1) if group_size <= 0 else min(group_size, width)
    row_step = -(-out * width // _SAMPLE)
    rows = weight[::row_step].float()
    blocks = pad(rows, (0, -width % size)).view(rows.shape[0], -1, size)
    scaled = blocks / blocks.abs().amax(-1, keepdim=True).clamp_min(1e-12)
    values = scaled.flatten(1)[:, :width].flatten().sort().values
    share = torch.arange(2**bits + 1, device=weight.device) / 2**bits
    quantiles = values[(share * (values.numel() - 1)).round().long()]
    levels = (quantiles[1:] + quantiles[:-1]) / 2
    return levels / levels.abs().amax().clamp_min(1e-12)
