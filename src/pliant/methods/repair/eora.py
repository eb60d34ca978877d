"""EoRA: spend the rank of the repair where the inputs have their energy."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pliant.codes import Code
from pliant.errors import PliantError
from pliant.methods.catalog import method
from pliant.methods.repair._residual import compensate
from pliant.observe.statistics import Statistics


@method(
    "eora",
    kind="repair",
    paper="EoRA: Training-free Compensation for Compressed LLM with Eigenspace Low-Rank "
    "Approximation",
    needs=("second_moment",),
)
def eora(
    weight: Tensor,  # [out, in]
    statistics: Statistics,
    *,
    base: str = "gptq",
    rank: int = 16,
    factor_bits: int = 16,
    **options: Any,
) -> Code:
    """A quantized weight plus a rank-r term that minimises |(W - Q - AB) X|.

    The error E of `base`, any quantize method called with `options`, is projected into the
    eigenspace of H = X X^T, scaled by the roots of its eigenvalues, and truncated there; mapping
    back cancels the scaling and leaves A = U, B = U^T E with U the leading left singular vectors
    of E H^(1/2). Factors are stored as in `lorc`. Cost: one Cholesky factor of H and one
    eigendecomposition of size min(out, in). Source: Liu et al. 2024.
    """
    if statistics.second_moment is None:
        raise PliantError("eora needs the second moment of its inputs; observe it first")
    moment = statistics.second_moment
    return compensate(weight, statistics, base, rank, factor_bits, options, moment)
