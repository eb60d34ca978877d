"""Scores of allocations that are computed once: the same allocation, or the same function.

Unified Functional Hashing in Automatic Machine Learning: two
candidates that give the same outputs on a fixed probe are one, however they are written down.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Score = Callable[[Mapping[str, int], int], float]
Fingerprint = Callable[[Mapping[str, int]], str]

_BITS = 20  # of the largest output: far below what a rung changes, above float32's noise


class OutputsHash:
    """A hash of outputs, given part after part, each rounded to 2^-20 of its largest value.

    Outputs that differ by less are told apart only when they fall on two sides of a rounding
    boundary, which costs an evaluation and no more.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, outputs: Tensor) -> None:
        values = outputs.detach().double()
        largest = float(values.abs().max()) if values.numel() else 0.0
        if not math.isfinite(largest):
            self._digest.update(b"not finite")
            return
        power = math.ceil(math.log2(largest)) if largest else 0
        steps = (values * 2.0 ** (_BITS - power)).round().to(torch.int64)
        self._digest.update(f"{power} {tuple(outputs.shape)}".encode())
        self._digest.update(steps.cpu().contiguous().numpy().tobytes())

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


class Scored:
    """`score(allocation, tokens)`, computed once for each allocation, and for each function.

    fingerprint: a string that two allocations share only if they compute the same; without it
    only equal allocations are one. It is asked for once an allocation. evaluations: calls of
    `score`; known: answers for the same allocation; merged: for another that computes the same.
    """

    def __init__(self, score: Score, fingerprint: Fingerprint | None = None) -> None:
        self._score = score
        self._fingerprint = fingerprint
        self._of_allocation: dict[tuple[object, int], float] = {}
        self._of_function: dict[tuple[str, int], float] = {}
        self._prints: dict[object, str] = {}
        self.evaluations = 0
        self.known = 0
        self.merged = 0

    def __call__(self, allocation: Mapping[str, int], tokens: int) -> float:
        key = tuple(sorted(allocation.items()))
        if (key, tokens) in self._of_allocation:
            self.known += 1
            return self._of_allocation[key, tokens]
        function: tuple[str, int] | None = None
        if self._fingerprint is not None:
            if key not in self._prints:
                self._prints[key] = self._fingerprint(allocation)
            function = (self._prints[key], tokens)
            if function in self._of_function:
                self.merged += 1
                self._of_allocation[key, tokens] = self._of_function[function]
                return self._of_function[function]
        self.evaluations += 1
        found = self._score(allocation, tokens)
        self._of_allocation[key, tokens] = found
        if function is not None:
            self._of_function[function] = found
        return found
