"""Binary low-rank factors that can be trained: each sign's place, and all three kinds of scales."""

from __future__ import annotations

import torch
from torch import Tensor

from pliant.codes import Code, GroupInt, LowRank, Scaled, Sum
from pliant.errors import PliantError
from pliant.methods.latent import LatentInt


class LatentFactors:
    """A code of `littlebit` as continuous parameters, with straight-through gradients.

    positions, log_scales: one `LatentInt` a factor, U and V of each term; log_columns [in] a
    term. `weight()` is what the code of `encode()` decodes to. Source: LittleBit: Ultra Low-Bit
    Quantization via Latent Factorization (what its training learns).
    """

    def __init__(self, code: Code, weight: Tensor) -> None:
        """code: where training starts. weight [out, in]: the original, on the code's device.

        A sign starts as near to flipping as the factor that fits the weight best, the other
        factor as it is, and never beyond: the first forward pass is the code's.
        """
        self._sum = isinstance(code, Sum)
        parts = code.parts if isinstance(code, Sum) else (code,)
        whole = code.decode()
        self.factors: list[tuple[LatentInt, LatentInt]] = []
        self.log_columns: list[Tensor] = []
        for part in parts:
            u, v, column = _factors(part)
            rest = weight.float() - (whole - part.decode())
            left, right = u.decode(), v.decode() * column
            best_u = torch.linalg.lstsq(right.t(), rest.t()).solution.t()
            best_v = torch.linalg.lstsq(left, rest / column.clamp_min(1e-8)).solution
            self.factors.append(
                (LatentInt(u, _finite(best_u, u)), LatentInt(v, _finite(best_v, v)))
            )
            self.log_columns.append(column.clamp_min(1e-8).log().requires_grad_(True))

    @property
    def positions(self) -> list[Tensor]:
        """Places of all signs, in steps of their grid."""
        return [latent.position for pair in self.factors for latent in pair]

    @property
    def log_scales(self) -> list[Tensor]:
        """Row and latent scales of each term, then the columns'."""
        return [latent.log_scale for pair in self.factors for latent in pair] + self.log_columns

    def weight(self) -> Tensor:
        """[out, in] float32, differentiable in positions and log_scales."""
        terms = []
        for (u, v), log_column in zip(self.factors, self.log_columns, strict=True):
            column = log_column.exp()
            column = column + (column.half().float() - column).detach()
            terms.append((u.weight() @ v.weight()) * column)
        return torch.stack(terms).sum(0)

    @torch.no_grad()
    def encode(self) -> Code:
        """The code of what is learned, of as many bytes as the one that training started from."""
        parts = tuple(
            Scaled(LowRank(u.encode(), v.encode()), None, log_column.exp().half())
            for (u, v), log_column in zip(self.factors, self.log_columns, strict=True)
        )
        return Sum(parts) if self._sum else parts[0]


def _factors(code: Code) -> tuple[GroupInt, GroupInt, Tensor]:
    """(U with row scales, V with latent scales, column scales) of one term."""
    if isinstance(code, Scaled) and isinstance(code.inner, LowRank) and code.in_scale is not None:
        a, b = code.inner.a, code.inner.b
        if isinstance(a, GroupInt) and isinstance(b, GroupInt) and code.out_scale is None:
            return a, b, code.in_scale.float()
    raise PliantError("only a code of littlebit has binary factors to train")


def _finite(factor: Tensor, code: GroupInt) -> Tensor:
    """The fitted factor, or the code's own where the fit is singular."""
    return factor if bool(torch.isfinite(factor).all()) else code.decode()
