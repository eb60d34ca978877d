"""What benches share: one pass of observation over all linear layers, kept in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from torch import Tensor

from pliant.codes import Code
from pliant.model import StreamedModel
from pliant.observe import Observation, Sweep


def linear_observations(
    model: StreamedModel,
    ids: Tensor,
    needs: frozenset[str],
    weighted: bool = True,
    weights: Tensor | None = None,
) -> Iterator[Observation]:
    """The observation of every linear layer, the last layer's first. weights [n]: of sequences."""
    wanted = {t.name: needs for t in model.targets if t.block is not None}
    with tempfile.TemporaryDirectory() as scratch:
        sweep = Sweep(model, ids, Path(scratch), needs=wanted, weighted=weighted, weights=weights)
        sweep.forward()
        _, gradient = sweep.outer()
        for index in reversed(range(len(model.blocks))):
            seen, gradient = sweep.block(index, gradient)
            yield from seen


def build_all(
    model: StreamedModel,
    observations: Iterable[Observation],
    build: Callable[[Tensor, Observation], Code],
) -> dict[str, Code]:
    """`build(weight, observation)` for every observed target, by name."""
    return {o.target.name: build(model.weight(o.target), o) for o in observations}


def linear_numbers(model: StreamedModel) -> int:
    """Weights in all linear layers."""
    return sum(t.shape[0] * t.shape[1] for t in model.targets if t.block is not None)
