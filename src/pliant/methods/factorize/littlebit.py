"""LittleBit: a low-rank product of two sign matrices, scaled by rows, columns and ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from pliant.codes import Code, Sum
from pliant.errors import PliantError
from pliant.methods.catalog import method
from pliant.methods.factorize._binary_factors import BinaryFactors, dual_svid, refine
from pliant.observe.statistics import Statistics


@method(
    "littlebit",
    kind="factorize",
    paper="LittleBit: Ultra Low-Bit Quantization via Latent Factorization",
    needs=("second_moment",),
)
def littlebit(
    weight: Tensor,  # [out, in]
    statistics: Statistics,
    *,
    bits: float = 1.0,
    residual: bool = True,
    rounds: int = 4,
    rotations: int = 10,
    damp: float = 0.1,
) -> Code:
    """W ~ diag(row) U diag(latent) V diag(column), U and V signs, within `bits` bits a weight.

    The rank is the largest whose packed signs and fp16 scales fit; `residual` splits the bytes
    between two such terms, the second for what the first leaves. Signs start from the factors of
    an SVD of the weight, inputs scaled by their root mean square, and scales from rank-1 fits of
    the factors' magnitudes (Dual-SVID), the factors turned `rotations` steps towards signs first.
    In place of the paper's training, `rounds` of sign flips and least-squares scales lower
    tr(E H E^T), H the inputs' second moment plus `damp` of its mean diagonal (the identity when
    not observed); rounds=0 and rotations=0 leave the paper's start. Cost: an SVD, then
    O(rank in (in + out)) a round. A matrix too small for two terms gets one, of rank 1 at least,
    even where that takes more than `bits`. Source: Lee et al. 2025.
    """
    if not bits > 0 or rounds < 0 or rotations < 0 or not damp > 0:
        raise PliantError("littlebit needs bits and damp above 0, rounds and rotations from 0")
    out, width = weight.shape
    budget = int(bits * out * width / 8)
    terms = 2 if residual and 2 * BinaryFactors.size(out, width, 1) <= budget else 1
    rank = _rank(out, width, budget // terms)
    w, moment = weight.float(), _damped(weight, statistics, damp)
    scale = moment.diagonal().sqrt()
    factors: list[BinaryFactors] = []
    for _ in range(terms):
        rest = w - sum(term.dense() for term in factors)
        start = dual_svid(rest, rank, scale / scale.mean(), rotations)
        factors.append(refine(start, rest, moment) if rounds else start)
    for _ in range(rounds - 1):
        for index in range(terms):
            others = sum(term.dense() for i, term in enumerate(factors) if i != index)
            factors[index] = refine(factors[index], w - others, moment)
    codes = tuple(term.code() for term in factors)
    return codes[0] if terms == 1 else Sum(codes)


def _rank(out: int, width: int, nbytes: int) -> int:
    """The largest rank whose term takes at most `nbytes`; 1 when none does."""
    low, high = 1, min(out, width)
    while low < high:
        middle = (low + high + 1) // 2
        if BinaryFactors.size(out, width, middle) <= nbytes:
            low = middle
        else:
            high = middle - 1
    return low


def _damped(weight: Tensor, statistics: Statistics, damp: float) -> Tensor:
    """H + damp mean(diag H) I, or I without H. [in, in]"""
    identity = torch.eye(weight.shape[1], device=weight.device)
    if statistics.second_moment is None:
        return identity
    moment = statistics.second_moment.float()
    mean = moment.diagonal().mean()
    return moment + damp * mean * identity if float(mean) > 0 else identity
