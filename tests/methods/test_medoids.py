"""FastPAM: the medoids of plain PAM for a k-th of the distances."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pliant.errors import PliantError
from pliant.methods.calibrate.medoids import build, medoids, swap
from pliant.observe import Candidates


class Counted:
    """Distances between random points; counts how many are evaluated."""

    def __init__(self, n: int, seed: int) -> None:
        points = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed)).double()
        self.matrix = torch.cdist(points, points)
        self.evaluations = 0

    def __call__(self, point: int) -> Tensor:
        self.evaluations += len(self.matrix)
        return self.matrix[point]


def plain_swap(distances: Counted, start: list[int]) -> tuple[list[int], int]:
    """The published PAM: for every medoid and every candidate, the total after their swap."""
    points, rounds = list(start), 0
    n = len(distances.matrix)
    while True:
        rounds += 1
        rows = torch.stack([distances.matrix[p] for p in points])
        now = float(rows.amin(0).sum())
        best = (now - 1e-9, -1, -1)
        for medoid in range(len(points)):
            others = torch.cat([rows[:medoid], rows[medoid + 1 :]])
            rest = others.amin(0) if len(others) else torch.full((n,), float("inf")).double()
            for candidate in range(n):
                if candidate not in points:
                    total = float(torch.minimum(rest, distances(candidate)).sum())
                    if total < best[0]:
                        best = (total, medoid, candidate)
        if best[1] < 0:
            return points, rounds
        points[best[1]] = best[2]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_the_medoids_of_plain_pam_for_a_kth_of_the_distances(k: int, seed: int) -> None:
    """From the same random start, as far from the optimum as PAM's own start is near it."""
    n = 48
    generator = torch.Generator().manual_seed(100 + seed)
    start = torch.randperm(n, generator=generator)[:k].tolist()
    plain, fast = Counted(n, seed), Counted(n, seed)
    expected, rounds = plain_swap(plain, start)
    found = swap(fast, start)
    assert found.points.tolist() == expected
    assert rounds > 1 or k == 1, "some swap was made"
    rows = plain.matrix[expected]
    assert found.total == pytest.approx(float(rows.amin(0).sum()))
    assert torch.equal(found.nearest, rows.argmin(0))
    # k times fewer in each round; beside them, one row for each medoid and for each swap.
    assert plain.evaluations == rounds * k * (n - k) * n
    assert fast.evaluations == rounds * (n - k) * n + (k + rounds - 1) * n


def test_build_takes_the_best_point_each_time() -> None:
    distances = Counted(30, 0)
    chosen = build(distances, 30, 4)
    for k in range(4):
        totals = [
            float(distances.matrix[[*chosen[:k], p]].amin(0).sum()) if p not in chosen[:k] else 1e9
            for p in range(30)
        ]
        assert chosen[k] == min(range(30), key=lambda p: totals[p])


def clustered(sizes: list[int]) -> Candidates:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(len(sizes), 16, generator=generator) * 10
    states = torch.cat(
        [
            c + 0.1 * torch.randn(n, 16, generator=generator)
            for c, n in zip(centres, sizes, strict=True)
        ]
    )
    return Candidates(torch.zeros(len(states), 4, dtype=torch.long), states=states)


def test_one_medoid_a_cluster_weighted_by_its_size() -> None:
    sizes = [20, 5, 12, 3]
    found = medoids(clustered(sizes), 4)
    labels = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes))
    assert sorted(labels[found.indices].tolist()) == [0, 1, 2, 3]
    assert found.weights.mean() == pytest.approx(1)
    for index, weight in zip(found.indices, found.weights, strict=True):
        assert float(weight) == pytest.approx(sizes[int(labels[index])] / 10)
    assert medoids(clustered(sizes), 4, by_size=False).weights.tolist() == [1] * 4


def test_copies_and_all_of_them() -> None:
    states = torch.ones(5, 3)
    found = medoids(Candidates(torch.zeros(5, 2), states=states), 3)
    assert len(set(found.indices.tolist())) == 3
    assert float(found.weights.min()) > 0
    everyone = medoids(clustered([4, 3]), 7)
    assert sorted(everyone.indices.tolist()) == list(range(7))


def test_mistakes() -> None:
    with pytest.raises(PliantError, match="hidden states"):
        medoids(Candidates(torch.zeros(5, 2)), 3)
    with pytest.raises(PliantError, match="cannot be chosen"):
        medoids(clustered([2]), 3)
