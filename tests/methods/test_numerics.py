"""Shared numerics against brute force and against torch's own SVD."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from pliant.methods.numerics import kmeans_rows, project_error, weighted_error

torch.set_num_threads(1)


def test_kmeans_is_near_the_best_split_of_every_row() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(20, 12), torch.rand(20, 12) + 0.05
    centers, index = kmeans_rows(x, w, 4)
    got = (w * (x - centers.gather(1, index.long())) ** 2).sum(1)
    optimum = 0.0
    for row in range(20):
        order = x[row].argsort()
        v, u = x[row][order].double(), w[row][order].double()
        best = min(
            sum(
                float((u[a:b] * (v[a:b] - (u[a:b] * v[a:b]).sum() / u[a:b].sum()) ** 2).sum())
                for a, b in zip((0, *cuts), (*cuts, 12), strict=True)
            )
            for cuts in combinations(range(1, 12), 3)
        )
        assert float(got[row]) <= 2.5 * best + 1e-5
        optimum += best
    assert float(got.sum()) <= 1.2 * optimum


def test_kmeans_assigns_the_nearest_center_and_needs_no_more_levels_than_values() -> None:
    torch.manual_seed(1)
    x = torch.randn(3, 50).sign() * torch.tensor([[1.0], [2.0], [0.5]])
    centers, index = kmeans_rows(x, torch.ones(3, 50), 4)
    assert torch.equal(centers.gather(1, index.long()), x)
    x = torch.randn(5, 64)
    centers, index = kmeans_rows(x, torch.rand(5, 64), 8)
    nearest = (x[..., None] - centers[:, None]).abs().amin(-1)
    torch.testing.assert_close((x - centers.gather(1, index.long())).abs(), nearest)


def test_values_without_weight_do_not_pull_on_the_centers() -> None:
    x = torch.cat([torch.linspace(-1, 1, 40), torch.tensor([500.0])])[None]
    w = torch.ones_like(x)
    w[0, -1] = 0
    centers, _ = kmeans_rows(x, w, 4)
    assert float(centers.abs().max()) <= 1.0


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (40, 40)])
def test_projection_is_the_optimum_that_svd_finds(shape: tuple[int, int]) -> None:
    torch.manual_seed(2)
    out, width = shape
    error, mix = torch.randn(out, width), torch.randn(width, width)
    moment = mix @ mix.T / width
    values = torch.linalg.svdvals(error)
    a, b = project_error(error, 7)
    torch.testing.assert_close((error - a @ b).norm(), values[7:].norm(), rtol=1e-4, atol=0)

    root = torch.linalg.cholesky(moment.double())
    best = float(torch.linalg.svdvals(error.double() @ root)[7:].square().sum())
    a, b = project_error(error, 7, moment)
    assert weighted_error(error - a @ b, moment) == pytest.approx(best, rel=1e-2)
    a, b = project_error(error, min(shape), moment)
    torch.testing.assert_close(a @ b, error, rtol=1e-3, atol=1e-3)


def test_a_singular_moment_is_no_obstacle() -> None:
    torch.manual_seed(3)
    x = torch.randn(5, 40)
    error = torch.randn(20, 40)
    a, b = project_error(error, 5, x.T @ x / 5)
    left = weighted_error(error - a @ b, x.T @ x / 5) / weighted_error(error, x.T @ x / 5)
    assert left < 1e-2
    a, b = project_error(error, 5, torch.zeros(40, 40))
    assert bool(torch.isfinite(a @ b).all())
