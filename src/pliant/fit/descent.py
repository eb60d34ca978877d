"""Adam on latents: the step that moves what training learns, and the weights that follow from it.

Sources: Adam: A Method for Stochastic Optimization. On a GPU the matrices of a whole model take a
few launches (kernels/triton/latent.py); elsewhere plain torch does the same, one after another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pliant.methods.latent import Latent

BETAS = (0.9, 0.99)
EPS = 1e-8


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
    rates = [corrected(rate(latent.bits), scale_rate, latent.steps) for latent in latents]
    if latents and latents[0].position.is_cuda:
        from pliant.kernels.triton import latent as launches

        launches.descend(latents, gradients, rates, BETAS, EPS)
        return
    for latent, gradient, (own, of_scale, root) in zip(latents, gradients, rates, strict=True):
        latent.position.grad = latent.log_scale.grad = None
        latent.weight().backward(gradient.float())  # type: ignore[no-untyped-call]
        first, second, scale_first, scale_second = latent.moments
        _adam(latent.position, first, second, own, root)
        _adam(latent.log_scale, scale_first, scale_second, of_scale, root)


def corrected(rate: float, scale_rate: float, steps: int) -> tuple[float, float, float]:
    """Both rates over Adam's first bias correction at step `steps`, from 1; the second's root."""
    first, second = (1 - beta**steps for beta in BETAS)
    return rate / first, scale_rate / first, math.sqrt(second)


@torch.no_grad()
def _adam(parameter: Tensor, mean: Tensor, square: Tensor, rate: float, root: float) -> None:
    gradient = parameter.grad
    assert gradient is not None
    mean.lerp_(gradient, 1 - BETAS[0])
    square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
    parameter.addcdiv_(mean, square.sqrt().div_(root).add_(EPS), value=-rate)
    parameter.grad = None
