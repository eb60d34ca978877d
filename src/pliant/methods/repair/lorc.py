"""LoRC: add back the leading singular vectors of the quantization error."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pliant.codes import Code
from pliant.methods.catalog import method
from pliant.methods.repair._residual import compensate
from pliant.observe.statistics import Statistics


@method(
    "lorc",
    kind="repair",
    paper="ZeroQuant-V2: Exploring Post-training Quantization in LLMs from Comprehensive Study "
    "to Low Rank Compensation",
    needs=("second_moment",),
)
def lorc(
    weight: Tensor,  # [out, in]
    statistics: Statistics,
    *,
    base: str = "gptq",
    rank: int = 16,
    factor_bits: int = 16,
    **options: Any,
) -> Code:
    """A quantized weight plus a rank-r term that minimises |W - Q - AB|_F.

    The term is the truncated SVD of the error of `base`, any quantize method, called with
    `options`. Factors take rank (out + in) values of `factor_bits` (16, or 8 with a scale for
    each 64). The second moment is for the default base alone. Cost: one eigendecomposition of
    size min(out, in). Source: Yao et al. 2023, low-rank compensation.
    """
    return compensate(weight, statistics, base, rank, factor_bits, options, None)
