"""A low-rank product of signs with scales: its start from an SVD, and its refinement."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pliant.codes import GroupInt, LowRank, Scaled
from pliant.codes.packing import packed_nbytes
from pliant.methods.numerics import project_error

_HALVINGS = 6  # of a set of flips that does not lower the error as one


@dataclass(frozen=True, eq=False)
class BinaryFactors:
    """W ~ diag(row) U diag(latent) V diag(column), U and V of +1 and -1, scales >= 0."""

    u: Tensor  # [out, rank]
    v: Tensor  # [rank, in]
    row: Tensor  # [out]
    latent: Tensor  # [rank]
    column: Tensor  # [in]

    def left(self) -> Tensor:
        """diag(row) U diag(latent), [out, rank]."""
        return self.row[:, None] * self.u * self.latent

    def dense(self) -> Tensor:
        return (self.left() @ self.v) * self.column

    def code(self) -> Scaled:
        """Packed signs and fp16 scales; a row's scale is U's, a latent scale is V's."""
        # Each scale near 1 but the row's, so that fp16 is precise for all three.
        column, latent = self.column.mean().clamp_min(1e-20), self.latent.mean().clamp_min(1e-20)
        row = self.row * column * latent
        u = GroupInt.pack(self.u > 0, 2 * row[:, None], None, 1, 0)
        v = GroupInt.pack(self.v > 0, 2 * (self.latent / latent)[:, None], None, 1, 0)
        return Scaled(LowRank(u, v), None, (self.column / column).half())

    @staticmethod
    def size(out: int, width: int, rank: int) -> int:
        """`nbytes` of the code at that rank."""
        signs = packed_nbytes(out, rank, 1) + packed_nbytes(rank, width, 1)
        return signs + 2 * (out + rank + width)


def dual_svid(
    matrix: Tensor,  # [out, in]
    rank: int,
    input_scale: Tensor,  # [in], columns are scaled by it before, and their scales back after
    rotations: int = 0,
) -> BinaryFactors:
    """The signs of an SVD's factors, and a rank-1 fit of each factor's magnitudes.

    Any rotation between the two factors leaves their product as it is; `rotations` steps of
    Iterative Quantization (Gong and Lazebnik) look for one after which both are close to signs.
    """
    a, b = project_error(matrix * input_scale, rank)
    root = b.norm(dim=1).clamp_min(1e-20).sqrt()  # of each singular value, to both factors
    a, b = a * root, b / root[:, None]
    if rotations > 0:
        rotation = _towards_signs(torch.cat([a, b.t()]), rotations)
        a, b = a @ rotation, rotation.t() @ b
    row, from_u = (f.abs() for f in project_error(a.abs(), 1))
    from_v, column = (f.abs() for f in project_error(b.abs(), 1))
    latent = from_u[0] * from_v[:, 0]
    return BinaryFactors(_sign(a), _sign(b), row[:, 0], latent, column[0] / input_scale)


def _towards_signs(vectors: Tensor, steps: int) -> Tensor:
    """An orthogonal R that brings |sign(X R) - X R| down, X [n, rank]. [rank, rank]"""
    rank = vectors.shape[1]
    start = torch.randn(rank, rank, generator=torch.Generator().manual_seed(0))
    rotation: Tensor = torch.linalg.qr(start).Q.to(vectors.device)
    for _ in range(steps):
        left, _, right = torch.linalg.svd(vectors.t() @ _sign(vectors @ rotation))
        rotation = left @ right
    return rotation


def refine(
    factors: BinaryFactors,
    weight: Tensor,  # [out, in]
    moment: Tensor,  # [in, in], positive definite
) -> BinaryFactors:
    """One round of flips and least-squares scales; none raises tr(E H E^T)."""
    projected = weight @ moment
    factors = _flip_u(factors, projected, moment)
    factors = _fit_rows(factors, projected, moment)
    factors = _flip_v(factors, weight, moment)
    factors = _fit_latent(factors, projected, moment)
    return _fit_columns(factors, projected, moment)


def _flip_u(f: BinaryFactors, projected: Tensor, moment: Tensor) -> BinaryFactors:
    """Each sign of U in turn to its best, all rows at once: rows do not share an error."""
    right = f.latent[:, None] * f.v * f.column
    gram = right @ moment @ right.t()
    u, row = f.u.clone(), f.row[:, None]
    slope = projected @ right.t() - row * (u @ gram)  # [out, rank]
    for k in range(u.shape[1]):
        wanted = _sign(slope[:, k] + f.row * u[:, k] * gram[k, k])
        slope.addr_(f.row * (wanted - u[:, k]), gram[k], alpha=-1.0)
        u[:, k] = wanted
    return replace(f, u=u)


def _flip_v(f: BinaryFactors, weight: Tensor, moment: Tensor) -> BinaryFactors:
    """Signs of each row of V that lower the error, as many at once as do so together."""
    left, v = f.left(), f.v.clone()
    gram = left.t() @ left
    h = f.column[:, None] * moment * f.column
    slope = (left.t() @ ((weight - f.dense()) @ moment)) * f.column  # [rank, in]
    for k in range(v.shape[0]):
        gain = -v[k] * slope[k] - gram[k, k] * h.diagonal()  # of each flip alone, over 4
        order = gain.argsort(descending=True)
        count = int((gain > 0).sum())
        for _ in range(_HALVINGS):
            if count == 0:
                break
            chosen = order[:count]
            delta = torch.zeros_like(v[k])
            delta[chosen] = -2.0 * v[k, chosen]
            moved = delta @ h
            if float(gram[k, k] * (moved @ delta) - 2 * (delta @ slope[k])) < 0:
                v[k] += delta
                slope.addr_(gram[:, k], moved, alpha=-1.0)
                break
            count //= 2
    return replace(f, v=v)


def _fit_rows(f: BinaryFactors, projected: Tensor, moment: Tensor) -> BinaryFactors:
    right = (f.u * f.latent) @ f.v * f.column  # each row before its scale
    row = (projected * right).sum(1) / ((right @ moment) * right).sum(1).clamp_min(1e-30)
    return replace(f, row=row.abs(), u=f.u * _sign(row)[:, None])


def _fit_latent(f: BinaryFactors, projected: Tensor, moment: Tensor) -> BinaryFactors:
    left, right = f.row[:, None] * f.u, f.v * f.column
    normal = (left.t() @ left) * (right @ moment @ right.t())
    latent = _solve(normal, (left * (projected @ right.t())).sum(0), f.latent)
    return replace(f, latent=latent.abs(), v=f.v * _sign(latent)[:, None])


def _fit_columns(f: BinaryFactors, projected: Tensor, moment: Tensor) -> BinaryFactors:
    product = f.left() @ f.v
    column = _solve((product.t() @ product) * moment, (product * projected).sum(0), f.column)
    return replace(f, column=column.abs(), v=f.v * _sign(column))


def _solve(normal: Tensor, target: Tensor, start: Tensor) -> Tensor:
    """x with normal x = target, from `start` where the equations leave it free."""
    damped = normal.double()
    damped.diagonal().add_(1e-6 * damped.diagonal().mean() + 1e-30)
    rest = target.double() - normal.double() @ start.double()
    lower, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        return start
    return start + torch.cholesky_solve(rest[:, None], lower)[:, 0].float()


def _sign(values: Tensor) -> Tensor:
    """+1 where positive or zero, else -1."""
    return torch.where(values >= 0, 1.0, -1.0)
