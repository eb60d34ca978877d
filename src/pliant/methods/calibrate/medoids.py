"""k-medoids of mean hidden states: each chosen sequence stands for those that are like it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pliant.errors import PliantError
from pliant.methods.catalog import method
from pliant.observe.candidates import Candidates, Selection, check_count

Distances = Callable[[int], Tensor]  # a point -> [n] distances of all points from it, float64


@method(
    "medoids",
    kind="calibrate",
    paper="Fast and Eager k-Medoids Clustering: O(k) Runtime Improvement of the PAM, CLARA, and "
    "CLARANS Algorithms",
    needs=("states",),
)
def medoids(
    candidates: Candidates, count: int, *, seed: int = 0, by_size: bool = True
) -> Selection:
    """The `count` candidates from which all others are least far: FastPAM on mean hidden states.

    States are standardized by channel, distances are Euclidean. by_size: a medoid's weight is the
    number of candidates nearest to it. Nothing is random, so `seed` changes nothing. Cost: n^2
    distances, and n of them read for each candidate swap. Source: Schubert and Rousseeuw 2021.
    """
    check_count(candidates, count)
    if candidates.states is None:
        raise PliantError("medoids needs the candidates' mean hidden states")
    states = candidates.states.double()
    states = (states - states.mean(0)) / states.std(0, correction=0).clamp_min(1e-12)
    matrix = torch.cdist(states, states, compute_mode="donot_use_mm_for_euclid_dist")
    found = swap(
        lambda point: matrix[point], build(lambda point: matrix[point], len(states), count)
    )
    sizes = torch.bincount(found.nearest, minlength=count).clamp_min(1)  # of copies, one may be 0
    return Selection.of(found.points, sizes if by_size else None)


@dataclass(frozen=True, eq=False)
class Clustering:
    """points [k]: the medoids. nearest [n]: which of them each point is nearest to.

    total: the sum of distances to the nearest medoid.
    """

    points: Tensor
    nearest: Tensor
    total: float


def build(distances: Distances, n: int, k: int) -> list[int]:
    """PAM's start: one point after the other, each the one that lowers the total most."""
    nearest = torch.full((n,), float("inf"), dtype=torch.float64)
    chosen: list[int] = []
    for _ in range(k):
        best, lowest = -1, float("inf")
        for point in range(n):
            if point not in chosen:
                total = float(torch.minimum(nearest, distances(point).cpu()).sum())
                if total < lowest:
                    best, lowest = point, total
        chosen.append(best)
        nearest = torch.minimum(nearest, distances(best).cpu())
    return chosen


def swap(distances: Distances, start: list[int]) -> Clustering:
    """PAM's swaps of a medoid with another point, the best one each time, until none helps.

    FastPAM1: the distances of one candidate are read once for all k medoids that it could replace,
    where PAM reads them k times. What removing a medoid costs, without the candidate, is known
    beforehand; the candidate changes that only for points that are nearer to it.
    """
    points = list(start)
    k = len(points)
    table = torch.stack([distances(point).double().cpu() for point in points])  # [k, n]
    while True:
        nearest, first, second = _two_nearest(table)
        removal = torch.zeros(k, dtype=torch.float64)
        if k > 1:
            removal.index_add_(0, nearest, second - first)
        tolerance = 1e-12 * float(first.sum())  # a swap that only rounding favours is none
        best = (-tolerance, -1, -1)
        for candidate in range(table.shape[1]):
            if candidate in points:
                continue
            d = distances(candidate).double().cpu()
            change = removal + (d - first).clamp_max(0).sum()
            # A point whose medoid goes: to the candidate if that is nearer than its second.
            correction = torch.where(d < first, first - second, (d - second).clamp_max(0))
            if k > 1:
                change = change.index_add(0, nearest, correction)
            else:
                change = (d - first).sum()[None]
            medoid = int(change.argmin())
            if float(change[medoid]) < best[0]:
                best = (float(change[medoid]), medoid, candidate)
        if best[1] < 0:
            return Clustering(torch.tensor(points), nearest, float(first.sum()))
        points[best[1]] = best[2]
        table[best[1]] = distances(best[2]).double().cpu()


def _two_nearest(table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each point's nearest medoid, its distance, and the distance of the second nearest [n]."""
    if len(table) == 1:
        return torch.zeros(table.shape[1], dtype=torch.long), table[0], table[0]
    values, order = table.topk(2, dim=0, largest=False)
    return order[0], values[0], values[1]
