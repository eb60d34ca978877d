"""A stretch of decoder layers, as methods of kind "reconstruct" see it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pliant.codes import Code

Weights = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Window:
    """Adjacent layers with what enters them in the compressed model and should leave them.

    weights: the originals [out, in] by target name. run: hidden [b, T, H] on `device` through the
    layers, differentiable in the weights given to it (those left out are the originals').
    inputs [n, T, H]: fed by the compressed layers before, so that their errors are met here.
    outputs [n, T, H]: the original model's for the same text, fed by its own layers. Both lie in
    main memory.
    """

    weights: Weights
    run: Callable[[Weights, Tensor], Tensor]
    inputs: Tensor
    outputs: Tensor
    device: torch.device

    @torch.no_grad()
    def through(self, weights: Weights, batch: int) -> Iterator[tuple[slice, Tensor]]:
        """Outputs [b, T, H] for `inputs`, `batch` sequences at a time."""
        for start in range(0, len(self.inputs), batch):
            rows = slice(start, min(start + batch, len(self.inputs)))
            yield rows, self.run(weights, self.inputs[rows].to(self.device))

    def error(self, weights: Weights, batch: int = 4, wanted: Tensor | None = None) -> float:
        """Mean over tokens of `token_error` against `wanted` [n, T, H], by default `outputs`."""
        wanted = self.outputs if wanted is None else wanted
        total = 0.0
        for rows, found in self.through(weights, batch):
            total += float(token_error(found, wanted[rows].to(self.device)).sum())
        return total / max(self.inputs.shape[0] * self.inputs.shape[1], 1)


def decoded(codes: Mapping[str, Code], device: torch.device) -> dict[str, Tensor]:
    """The weights that codes stand for, float32."""
    return {name: code.to(device).decode() for name, code in codes.items()}


def token_error(found: Tensor, wanted: Tensor) -> Tensor:
    """|found - wanted|^2 / |wanted|^2 for each token [b, T].

    Relative, because the norm at the next layer's entrance divides each token by its size: a few
    tokens of huge activations would otherwise be all that is fitted.
    """
    difference = (found.float() - wanted.float()).square().sum(-1)
    return difference / wanted.float().square().sum(-1).clamp_min(1e-12)
