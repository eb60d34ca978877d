"""Correcting predicted damage by a few measurements of whole models.

EvoPress (Towards Optimal Dynamic Model Compression via Evolutionary Search) shows that the sum of
layer errors misleads: what a layer's error does depends on the layers around it. Measuring every
tensor alone is slow and still misses that. So whole models are measured, each a mixture of rungs
chosen at random around the climb, and factors for depth, role and bit width are fitted to explain
what was measured. The climb is then taken over corrected damages.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares

from pliant.plan.climb import Option, prefix

Allocation = dict[str, int]
Features = Mapping[str, Sequence[str]]  # target -> factor names, e.g. ("block 3", "role q_proj")


@dataclass(frozen=True)
class Sample:
    """One measured model. allocation: target -> option index. damage: nats a token."""

    allocation: Mapping[str, int]
    damage: float


@dataclass(frozen=True)
class Correction:
    """factors: multiplies the predicted damage of every option that carries the factor's name.

    The whole model's damage is exp(offset) * (sum of corrected damages) ** power. error: the
    root mean square of the fit's logarithmic residuals.
    """

    factors: Mapping[str, float]
    offset: float = 0.0
    power: float = 1.0
    error: float = 0.0

    def total(self, damages: float) -> float:
        """The whole model's damage, given the sum of its targets' corrected damages."""
        return math.exp(self.offset) * damages**self.power if damages > 0 else 0.0

    def apply(
        self, options: Mapping[str, Sequence[Option]], features: Features, levels: Features
    ) -> dict[str, list[Option]]:
        """`options` with corrected damages. levels: target -> one factor name an option."""
        corrected = {}
        for target, choices in options.items():
            own = math.prod(self.factors.get(name, 1.0) for name in features[target])
            corrected[target] = [
                Option(o.nbytes, o.damage * own * self.factors.get(level, 1.0))
                for o, level in zip(choices, levels[target], strict=True)
            ]
        return corrected


def draw(
    options: Mapping[str, Sequence[Option]],
    features: Features,
    sizes: Sequence[int],
    *,
    seed: int = 0,
    spread: float = 0.7,
) -> list[Allocation]:
    """One allocation of about each of `sizes` bytes, the climb's order shaken to tell apart
    what the factors do: each factor and each target is multiplied by a log-normal of `spread`.
    """
    chooser = random.Random(seed)
    drawn = []
    names = sorted({name for own in features.values() for name in own})
    for size in sizes:
        shake = {name: math.exp(chooser.gauss(0, spread)) for name in names}
        shaken = {}
        for target in sorted(options):
            own = math.prod(shake[name] for name in features[target])
            own *= math.exp(chooser.gauss(0, spread))
            shaken[target] = [Option(o.nbytes, o.damage * own) for o in options[target]]
        drawn.append(prefix(shaken, size))
    return drawn


def correct(
    options: Mapping[str, Sequence[Option]],
    features: Features,
    levels: Features,
    samples: Sequence[Sample],
    *,
    prior: float = 0.25,
) -> Correction:
    """Factors that explain the samples: ridge regression of log damage, solved by Gauss-Newton.

    prior: the standard deviation that a factor's logarithm is expected to have; with few samples
    the factors stay near 1. Without samples nothing is corrected.
    """
    if len(samples) < 2:
        return Correction({})
    targets = sorted(options)
    names = sorted(
        {n for t in targets for n in features[t]} | {n for t in targets for n in levels[t]}
    )
    column = {name: i for i, name in enumerate(names)}
    damages = np.array([[options[t][s.allocation[t]].damage for t in targets] for s in samples])
    carried = [
        [[column[n] for n in (*features[t], levels[t][s.allocation[t]])] for t in targets]
        for s in samples
    ]
    width = max(len(own) for row in carried for own in row)
    # Factors that a target lacks point at one more parameter, which stays 0.
    members = np.array(
        [[own + [len(names)] * (width - len(own)) for own in row] for row in carried]
    )
    measured = np.log([max(s.damage, 1e-12) for s in samples])
    noise = 0.03  # of a measurement, in logarithms

    def residuals(theta: np.ndarray) -> np.ndarray:
        logs = np.append(theta[2:], 0.0)[members].sum(-1)
        sums = np.log(np.maximum((damages * np.exp(logs)).sum(1), 1e-300))
        fitted = theta[0] + (1 + theta[1]) * sums
        return np.concatenate([(fitted - measured) / noise, theta[2:] / prior, theta[1:2] / 0.1])

    start = np.zeros(len(names) + 2)
    start[0] = float(np.mean(measured - np.log(np.maximum(damages.sum(1), 1e-300))))
    solved = least_squares(residuals, start, method="trf", max_nfev=60).x
    error = float(np.sqrt(np.mean((residuals(solved)[: len(samples)] * noise) ** 2)))
    factors = {name: float(math.exp(solved[2 + i])) for name, i in column.items()}
    return Correction(factors, float(solved[0]), float(1 + solved[1]), error)


def spaced(low: int, high: int, count: int) -> list[int]:
    """`count` sizes from low to high bytes, evenly spaced in logarithms."""
    if count < 2:
        return [int(math.sqrt(low * high))] * count
    ratio = (high / low) ** (1 / (count - 1))
    return [int(low * ratio**i) for i in range(count)]
