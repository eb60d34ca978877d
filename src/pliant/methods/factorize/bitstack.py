"""BitStack: a stack of blocks of about one bit, each of what the blocks below it leave."""

from __future__ import annotations

import torch
from torch import Tensor

from pliant.codes import Dense, LowRank, Signed, Sum
from pliant.errors import PliantError
from pliant.methods.catalog import method
from pliant.methods.numerics import project_error
from pliant.observe.statistics import Statistics


@method(
    "bitstack",
    kind="factorize",
    paper="BitStack: Fine-Grained Size Control for Compressed Large Language Models in Variable "
    "Memory Environments",
    needs=("second_moment",),
)
def bitstack(
    weight: Tensor,  # [out, in]
    statistics: Statistics,
    *,
    blocks: int = 2,
    rank: int = 16,
) -> Sum:
    """The sum of `blocks` terms sign(R) * A B, R what the terms before leave of the weight.

    A B is the truncated SVD of |R| at `rank`, its factors in fp16, so a block takes one bit a
    weight and 16 rank (out + in) bits. Columns are scaled by the root mean square of their
    inputs before, and back within B. Each block is made from those before it alone: fewer blocks
    are a prefix of more, and the scaled error falls with each. Cost: one eigendecomposition of
    size min(out, in) a block. Source: Wang et al. 2024; the order of blocks among all weights is
    the climb's.
    """
    if blocks < 1 or rank < 1:
        raise PliantError(f"blocks and rank must be at least 1, not {blocks} and {rank}")
    scale = _input_scale(weight, statistics)
    residual = weight.float() * scale
    parts: list[Signed] = []
    for _ in range(blocks):
        a, b = project_error(residual.abs(), min(rank, *weight.shape))
        size = b.norm(dim=1).clamp_min(1e-20).sqrt()  # shared, so that fp16 holds both factors
        magnitude = LowRank(Dense((a * size).half()), Dense((b / size[:, None] / scale).half()))
        part = Signed.of(residual > 0, magnitude)
        residual = residual - part.decode() * scale
        parts.append(part)
    return Sum(tuple(parts))


def _input_scale(weight: Tensor, statistics: Statistics) -> Tensor:
    """Root mean square of each input, 1 on average; ones when it is not known. [in]"""
    if statistics.second_moment is None:
        return torch.ones(weight.shape[1], device=weight.device)
    mean_square = statistics.second_moment.diagonal().float()
    # A channel that hardly fires must not blow up its column of B, which is divided by this.
    root = (mean_square + 1e-4 * mean_square.mean().clamp_min(1e-30)).sqrt()
    return root / root.mean()
