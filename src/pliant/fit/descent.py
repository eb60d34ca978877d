"""Adam on latents: the step that moves what training learns, and the weights that follow from it.

Sources: Adam: A Method for Stochastic Optimization. On a GPU the matrices of a whole model take a
few launches (kernels/triton/latent.py); elsewhere plain torch does the same, one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pliant.methods.latent import Latent

BETAS = (0.9, 0.99)
_EPS = 1e-8


@torch.no_grad()
def write_weights(latents: Sequence[Latent], weights: Sequence[Tensor]) -> None:
    """`weight()` of each latent into weights [out, in], all of one float type."""
    if latents and latents[0].position.is_cuda:
        from pliant.kernels.triton import latent as launches

        launches.write_weights(latents, weights)
        return
    for latent, weight in zip(latents, weights, strict=True):
        weight.copy_(latent.weight())


def descend(
    latents: Sequence[Latent],
    gradients: Sequence[Tensor],
    rate: Callable[[int], float],
    scale_rate: float,
) -> None:
    """One step of Adam for each latent, from the gradient [out, in] of its weight.

    rate: of positions, by the code's bits; scale_rate: of logarithms of scales.
    """
    for latent in latents:
        latent.begin_step()
    if latents and latents[0].position.is_cuda:
        from pliant.kernels.triton import latent as launches

        rates = [
            launches.corrected(rate(latent.bits), scale_rate, latent.steps, BETAS)
            for latent in latents
        ]
        launches.descend(latents, gradients, rates, BETAS, _EPS)
        return
    for latent, gradient in zip(latents, gradients, strict=True):
        latent.position.grad = latent.log_scale.grad = None
        latent.weight().backward(gradient.float())  # type: ignore[no-untyped-call]
        first, second, scale_first, scale_second = latent.moments
        _adam(latent.position, first, second, latent.steps, rate(latent.bits))
        _adam(latent.log_scale, scale_first, scale_second, latent.steps, scale_rate)


@torch.no_grad()
def _adam(parameter: Tensor, mean: Tensor, square: Tensor, steps: int, rate: float) -> None:
    gradient = parameter.grad
    assert gradient is not None
    mean.lerp_(gradient, 1 - BETAS[0])
    square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
    first, second = (1 - beta**steps for beta in BETAS)
    parameter.addcdiv_(mean, (square / second).sqrt_().add_(_EPS), value=-rate / first)
    parameter.grad = None
