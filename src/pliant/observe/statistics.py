"""What a pass over calibration text leaves behind for one target."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Statistics:
    """Statistics of one target's inputs and of the gradients at its outputs, float32.

    Each field is None unless a chosen method asked for it. x is an input [in], g the gradient
    of a sequence's log-likelihood at the output [out] for the same token.
    """

    tokens: int = 0
    second_moment: Tensor | None = None  # [in, in] mean of x x^T, weighted by |g|^2 if asked
    input_max: Tensor | None = None  # [in] largest |x|
    output_max: Tensor | None = None  # [out] largest |W x|
    fisher: Tensor | None = None  # [out, in] mean of (g x)^2: the diagonal Fisher information
    output_moment: Tensor | None = None  # [out] mean of g^2
