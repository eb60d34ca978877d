"""What repairs by a low-rank term share: the base code, and storing the two factors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pliant.codes import Code, Dense, GroupInt, LowRank, Sum
from pliant.errors import RecipeError
from pliant.methods.catalog import find
from pliant.methods.grid import fit_grid
from pliant.methods.numerics import project_error
from pliant.observe.statistics import Statistics


def compensate(
    weight: Tensor,
    statistics: Statistics,
    base: str,
    rank: int,
    factor_bits: int,
    options: dict[str, Any],
    moment: Tensor | None,
) -> Code:
    """Sum(base code, low-rank term), the term fitted to the base's error under `moment`."""
    if rank < 1:
        raise RecipeError(f"rank must be at least 1, not {rank}")
    if factor_bits not in (16, 8):
        raise RecipeError(f"factor_bits must be 16 or 8, not {factor_bits}")
    code = base_code(weight, statistics, base, options)
    error = weight.float() - code.decode()
    a, b = project_error(error, min(rank, *weight.shape), moment)
    return Sum((code, store_factors(a, b, error, factor_bits)))


def base_code(weight: Tensor, statistics: Statistics, base: str, options: dict[str, Any]) -> Code:
    """The code that the quantize method `base` makes with `options`."""
    info = find(base)
    if info.kind != "quantize":
        raise RecipeError(f"a repair needs a quantize method as its base; {base!r} is {info.kind}")
    unknown = sorted(set(options) - set(info.options))
    if unknown:
        raise RecipeError(f"{base} has no option {unknown[0]!r}; it has {', '.join(info.options)}")
    code = info.function(weight, statistics, **options)
    assert isinstance(code, Code)
    return code


def store_factors(a: Tensor, b: Tensor, error: Tensor, factor_bits: int) -> LowRank:
    """A [out, rank] and B [rank, in] as codes; B is refitted to A as it is stored.

    A's columns are orthonormal; a column and its row share their norm, so that neither rounds
    worse than the other and fp16 stays in its normal range.
    """
    norm = b.norm(dim=1).clamp(min=1e-12).sqrt()
    stored_a = _store(a * norm, factor_bits)
    decoded = stored_a.decode().double()
    refitted = torch.linalg.lstsq(decoded, error.double()).solution.float()
    if not bool(torch.isfinite(refitted).all()):
        refitted = b / norm[:, None]
    return LowRank(stored_a, _store(refitted, factor_bits))


def _store(factor: Tensor, bits: int) -> Code:
    if bits == 16:
        return Dense(factor.half())
    grid = fit_grid(factor, bits, 64, symmetric=True, clip=False)
    member = torch.arange(factor.shape[1], device=factor.device) // 64
    q = torch.round(factor / grid.scales[:, member] + grid.zeros[:, member]).clamp_(0, grid.top)
    return GroupInt.pack(q.to(torch.uint8), grid.stored, None, bits, 64)
