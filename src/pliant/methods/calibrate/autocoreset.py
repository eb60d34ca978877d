"""AutoCoreset: a weighted few whose losses under many models add up to everyone's."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import lsq_linear
from torch import Tensor

from pliant.errors import PliantError
from pliant.methods.catalog import method
from pliant.observe.candidates import Candidates, Selection, check_count

_LEAST = 0.05  # of the mean weight: a sequence that hardly counted would be calibration time lost


@method(
    "autocoreset",
    kind="calibrate",
    paper="AutoCoreset: An Automatic Practical Coreset Construction Framework",
    needs=("losses",),
)
def autocoreset(
    candidates: Candidates, count: int, *, seed: int = 0, ridge: float = 1e-3
) -> Selection:
    """`count` candidates and weights whose mean loss vector is that of all candidates.

    A candidate's loss vector holds its loss under each of K perturbed models. Frank-Wolfe on the
    hull of the vectors, with weights fitted anew in every step (its fully corrective form), picks
    the members; the last fit keeps every weight above a twentieth of the mean, and `ridge` pulls
    them together where the vectors leave them free. The paper adds queries while it trains; the
    perturbed models are drawn beforehand here. Nothing is random, so `seed` changes nothing.
    Source: Maalouf, Tukan, Braverman and Rus 2023.
    """
    check_count(candidates, count)
    if candidates.losses is None:
        raise PliantError("autocoreset needs the candidates' losses under perturbed models")
    vectors = _standardized(candidates.losses)
    chosen: list[int] = []
    weights = np.zeros(0)
    residual = np.zeros(vectors.shape[1])  # of all candidates' mean, which is 0
    for _ in range(count):
        # The vertex along the steepest descent of half the squared norm of the weighted mean.
        # In the first step, and where the residual is 0, the candidate nearest to the mean.
        score = vectors @ residual if residual @ residual > 1e-18 else (vectors**2).sum(1)
        score[chosen] = np.inf
        chosen.append(int(score.argmin()))
        weights = _fit(vectors[chosen], ridge)
        residual = weights @ vectors[chosen] / len(chosen)
    return Selection.of(torch.tensor(chosen), torch.from_numpy(weights))


def _standardized(losses: Tensor) -> np.ndarray:
    """Loss vectors [n, K] about their mean, in units of their root mean square."""
    found = losses.double().cpu().numpy()
    found = found - found.mean(0)
    return np.asarray(found / max(float(np.sqrt((found**2).mean())), 1e-30))


def _fit(vectors: np.ndarray, ridge: float) -> np.ndarray:
    """Weights [m] of mean 1 under which the mean of `vectors` [m, K] is nearest to 0."""
    m = len(vectors)
    rows = np.concatenate(
        [
            vectors.T / m,
            np.full((1, m), 1e3 / m),  # the mean weight is 1
            np.eye(m) * np.sqrt(ridge / m),
        ]
    )
    wanted = np.concatenate([np.zeros(vectors.shape[1]), [1e3], np.full(m, np.sqrt(ridge / m))])
    solved = lsq_linear(rows, wanted, bounds=(_LEAST, np.inf)).x
    return np.asarray(solved / solved.mean())
