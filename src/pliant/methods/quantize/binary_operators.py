"""The operators that make weights binary, side by side: where the scale is, and how many terms."""

from __future__ import annotations

import torch
from torch import Tensor

from pliant.codes import Code, Codebook, Sum
from pliant.errors import PliantError
from pliant.methods.catalog import method
from pliant.methods.grid import Grid
from pliant.methods.quantize._levels import (
    binary_grid,
    feedback_factor,
    mean_magnitude,
    rounded,
)
from pliant.observe.statistics import Statistics

_OPERATORS = ("tensor", "channel", "group", "residual")
_BLOCK = 32


@method(
    "binary_operators",
    kind="quantize",
    paper="BiBench: Benchmarking and Analyzing Network Binarization",
    needs=("second_moment",),
)
def binary_operators(
    weight: Tensor,  # [out, in]
    statistics: Statistics,
    *,
    operator: str = "channel",
    group_size: int = 64,
    feedback: bool = False,
    scale_bits: int = 16,
) -> Code:
    """W ~ alpha sign(W), alpha = mean |w| of the matrix, the row or the group; or two such terms.

    operator: "tensor" is one alpha (sign and mean scale), "channel" one a row (XNOR-Net),
    "group" one for `group_size` inputs, "residual" a group's signs plus the signs of what they
    leave (ABC-Net, BiLLM), two bits in all. `feedback` chooses signs column by column and lets
    later columns make up for the errors of earlier ones (GPTQ); it alone uses the second moment.
    Cost: a pass, or GPTQ's. Source: Qin et al. 2023, the weight operators.
    """
    if operator not in _OPERATORS:
        raise PliantError(f"operator is one of {', '.join(_OPERATORS)}, not {operator!r}")
    if operator == "tensor":
        alpha = weight.float().abs().mean().half().float()
        grid = binary_grid(alpha.expand(weight.shape[0], 1), 0, 16)
        index = rounded(weight, grid, statistics, feedback)
        return Codebook.pack(index, torch.stack([-alpha, alpha])[None, None], 1)
    size = 0 if operator == "channel" else group_size
    first = binary_grid(mean_magnitude(weight, size), size, scale_bits)
    if operator != "residual":
        return first.pack(rounded(weight, first, statistics, feedback))
    signs = rounded(weight, first, statistics, feedback=False)
    rest = weight.float() - first.pack(signs).decode()
    second = binary_grid(mean_magnitude(rest, size), size, scale_bits)
    if feedback:
        signs, more = _two_signs_with_feedback(weight, first, second, *feedback_factor(statistics))
    else:
        more = rounded(rest, second, statistics, feedback=False)
    return Sum((first.pack(signs), second.pack(more)))


def _two_signs_with_feedback(
    weight: Tensor, first: Grid, second: Grid, factor: Tensor, order: Tensor
) -> tuple[Tensor, Tensor]:
    """Both signs of each weight, uint8 [out, in]: GPTQ's loop on the levels +-a +-b."""
    width = weight.shape[1]
    size = width if first.group_size <= 0 else first.group_size
    group = (order // size).tolist()
    halves = [(grid.scales / 2).t().contiguous() for grid in (first, second)]  # [groups, out]
    columns = weight.float().t()[order].contiguous()  # [in, out]
    signs = torch.empty(2, *columns.shape, dtype=torch.uint8, device=weight.device)
    errors = torch.empty_like(columns[:_BLOCK])
    for begin in range(0, width, _BLOCK):
        end = min(begin + _BLOCK, width)
        for i in range(begin, end):
            rest = columns[i]
            for term, half in enumerate(halves):
                positive = rest > 0
                signs[term, i] = positive
                rest = rest - torch.where(positive, half[group[i]], -half[group[i]])
            errors[i - begin] = rest / factor[i, i]
            columns[i + 1 : end].addr_(factor[i, i + 1 : end], errors[i - begin], alpha=-1.0)
        columns[end:].addmm_(factor[begin:end, end:].t(), errors[: end - begin], alpha=-1.0)
    back = torch.argsort(order)
    return signs[0, back].t(), signs[1, back].t()
