"""Numerics that several methods share: 1-d k-means for many rows, and low-rank projections."""

from __future__ import annotations

import torch
from torch import Tensor

_TILE = 1 << 19  # elements of a tile of rows


def kmeans_rows(
    values: Tensor,  # [rows, n]
    weights: Tensor,  # [rows, n], >= 0; values of weight 0 do not count
    levels: int,
    iterations: int = 30,
) -> tuple[Tensor, Tensor]:
    """(centers [rows, levels] rising, fp16 in float32; nearest index [rows, n] uint8).

    Lloyd's algorithm on sorted rows with prefix sums, from two starts (equal steps over the
    range, and the companding density (weight / density^2)^(1/3) of high-resolution theory); each
    row keeps its better end. So no row is worse than round-to-nearest on equal steps.
    """
    rows, n = values.shape
    centers = torch.empty(rows, levels, device=values.device)
    index = torch.empty(rows, n, dtype=torch.uint8, device=values.device)
    step = max(1, _TILE // max(n, 1))
    for start in range(0, rows, step):
        tile = slice(start, start + step)
        x = values[tile].float()
        found = _kmeans_tile(x.double(), weights[tile].double(), levels, iterations)
        found = found.float().half().float()
        centers[tile] = found
        middles = (found[:, 1:] + found[:, :-1]) / 2
        index[tile] = torch.searchsorted(middles, x).to(torch.uint8)
    return centers, index


def _kmeans_tile(x: Tensor, w: Tensor, levels: int, iterations: int) -> Tensor:
    x, order = x.sort(dim=1)
    w = w.gather(1, order)
    w = torch.where(w.sum(1, keepdim=True) > 0, w, 1.0)
    zero = x.new_zeros(x.shape[0], 1)
    mass = torch.cat([zero, w.cumsum(1)], 1)
    first = torch.cat([zero, (w * x).cumsum(1)], 1)

    counted = w > 0
    low = torch.where(counted, x, torch.inf).amin(1, keepdim=True)
    high = torch.where(counted, x, -torch.inf).amax(1, keepdim=True)
    share = torch.arange(levels, dtype=x.dtype, device=x.device)
    even = low + (high - low) * share / max(levels - 1, 1)
    gaps = torch.diff(x, dim=1, prepend=x[:, :1])
    density = ((gaps**2 + 1e-4 * gaps.square().mean(1, keepdim=True)) * w).pow(1 / 3).cumsum(1)
    wanted = (share + 0.5) / levels * density[:, -1:]
    compand = x.gather(1, torch.searchsorted(density, wanted).clamp(max=x.shape[1] - 1))

    best, best_gain = even, torch.full_like(low[:, 0], -torch.inf)
    for centers in (even, compand):
        for _ in range(iterations):
            moved, _ = _lloyd(x, mass, first, centers)
            if torch.equal(moved, centers):
                break
            centers = moved
        _, gain = _lloyd(x, mass, first, centers)
        better = gain > best_gain
        best = torch.where(better[:, None], centers, best)
        best_gain = torch.where(better, gain, best_gain)
    return best


def _lloyd(x: Tensor, mass: Tensor, first: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """Centers moved to their clusters' means, and sum of m^2/w: what the loss falls by. [rows]"""
    cuts = torch.searchsorted(x, (centers[:, 1:] + centers[:, :-1]) / 2)
    ends = torch.full((x.shape[0], 1), x.shape[1], device=x.device)
    cuts = torch.cat([torch.zeros_like(ends), cuts, ends], 1)
    held = mass.gather(1, cuts).diff(dim=1)
    moment = first.gather(1, cuts).diff(dim=1)
    full = held > 0
    moved = torch.where(full, moment / held.clamp(min=1e-300), centers).sort(1).values
    gain = torch.where(full, moment**2 / held.clamp(min=1e-300), 0.0).sum(1)
    return moved, gain


def project_error(
    error: Tensor,  # [out, in]
    rank: int,
    moment: Tensor | None = None,  # [in, in] second moment of the inputs; None: identity
    damp: float = 1e-4,
) -> tuple[Tensor, Tensor]:
    """(A [out, rank], B [rank, in]) that minimise tr((E - AB) H (E - AB)^T) at that rank.

    With U the leading left singular vectors of E H^(1/2), the minimum is A = U, B = U^T E, so
    H is never inverted. Cost: one eigendecomposition of size min(out, in).
    """
    e = error.double()
    m = e if moment is None else e @ _cholesky(moment.double(), damp)
    out, width = e.shape
    if out <= width:
        basis = torch.linalg.eigh(m @ m.t()).eigenvectors
        u = basis[:, -rank:].flip(1)
    else:
        v = torch.linalg.eigh(m.t() @ m).eigenvectors[:, -rank:].flip(1)
        u = torch.linalg.qr(m @ v).Q
    return u.float(), (u.t() @ e).float()


def _cholesky(moment: Tensor, damp: float) -> Tensor:
    """Lower L with L L^T = H + damping; the damping grows until H is positive definite."""
    mean = moment.diagonal().mean().clamp(min=1e-30)
    for _ in range(12):
        damped = moment.clone()
        damped.diagonal().add_(mean * damp)
        lower: Tensor
        lower, failed = torch.linalg.cholesky_ex(damped)
        if int(failed) == 0:
            return lower
        damp *= 10
    return torch.eye(moment.shape[0], dtype=moment.dtype, device=moment.device)


def weighted_error(error: Tensor, moment: Tensor) -> float:
    """tr(E H E^T): the mean squared error that E [out, in] makes at the outputs."""
    return float((error.double() @ moment.double() * error.double()).sum())
