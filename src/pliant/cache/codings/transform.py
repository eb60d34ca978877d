"""Transform coding: decorrelate what a head's numbers hold, and give bits where variance is.

Channels are turned to the principal axes of the sequence's first tokens, in the metric in which
errors count, and each axis gets the bits that reverse water-filling gives it, none to many. Axes of
one width share a table of levels fitted by k-means, for all heads.

Sources: the classical theory (Huang and Schultheiss, "Block Quantization of Correlated Gaussian
Random Variables"); for KV caches "KV Cache Transform Coding for Compact Storage in LLM Inference".
"""

from __future__ import annotations

import torch
from torch import Tensor

from pliant.cache.codings.coding import Coding, Parts, join, split
from pliant.codes.packing import PLANES
from pliant.errors import PliantError
from pliant.methods.numerics import kmeans_rows

_MOST = 8
# Mean squared error of the best levels for a Gaussian of variance 1, by bits (Max, 1960; from 6
# bits on by the Panter-Dite formula).
_GAUSSIAN = (1.0, 0.3634, 0.1175, 0.03454, 0.009497, 0.002499, 6.64e-4, 1.66e-4, 4.15e-5)
_SAMPLE = 1 << 15  # numbers that levels of a width are fitted on


class Transform(Coding):
    """`bits` a number on average over all heads; or every bit that saves `price` of error or more.

    metric: set before `fit`, [kv_heads, dim], what a channel's squared error costs; None: 1. Kept
    of a fit: rows of the basis in 8 bits, a scale for each, channels' means and weights, widths,
    levels.
    """

    price: float | None = None

    def __init__(self, bits: float) -> None:
        super().__init__()
        if not 0 < bits <= _MOST:
            raise PliantError(f"an average is above 0 and at most {_MOST} bits, not {bits}")
        self.bits = bits
        self.metric: Tensor | None = None

    def again(self) -> Transform:
        """Not fitted yet, with the metric and the bits that this one came to."""
        fresh = Transform(float(self.fitted[4].float().mean()))
        fresh.metric = self.metric
        return fresh

    def fit(self, sample: Tensor) -> None:
        heads, _, dim = sample.shape
        mean, weight, power, axes = self._axes(sample)
        centred = sample - mean.float()
        root = weight.float().sqrt()[:, None]
        if self.price is None:
            widths = _widths(power.flatten(), round(self.bits * heads * dim)).view(heads, dim)
        else:
            widths = (_gains(power) * self._unit() >= self.price).sum(-1)
        # rows of unit variance, so that one table serves many
        basis = power.sqrt()[..., None] * axes.mT.float() / root  # [heads, axes, dim]
        kept = widths > 0
        rows = basis[kept]
        step = (rows.abs().amax(1) / 127).clamp(min=1e-7).half()
        whole = (rows / step.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
        self.fitted = (whole, step, mean, weight, widths.to(torch.uint8))
        coefficients = centred @ self._analysis()
        flat = coefficients.transpose(0, 1).flatten(1)
        for width in self._present():
            x = flat[:, widths.flatten() == width].flatten().contiguous()
            x = x[:: max(1, len(x) // _SAMPLE)]
            levels = kmeans_rows(x[None], torch.ones_like(x)[None], 2**width)[0][0]
            self.fitted = (*self.fitted, levels.half())

    def gains(self, sample: Tensor) -> Tensor:
        """What each bit of each axis saves, in the metric's unit, [kv_heads, axes, bits]."""
        return _gains(self._axes(sample)[2]) * self._unit()

    def _unit(self) -> Tensor | float:
        """What weights were divided by, [kv_heads, 1, 1]."""
        return 1.0 if self.metric is None else self.metric.mean(1)[:, None, None]

    def _axes(self, sample: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Channels' means and weights (half), power [kv_heads, axes] and axes' directions."""
        mean = sample.mean(1, keepdim=True).half()
        weight = torch.ones_like(mean[:, 0]) if self.metric is None else _weights(self.metric)
        scaled = ((sample - mean.float()) * weight.float().sqrt()[:, None]).double()
        power, axes = torch.linalg.eigh(scaled.mT @ scaled / sample.shape[1])
        return mean, weight, power.clamp(min=1e-12).float(), axes

    def encode(self, states: Tensor) -> Parts:
        self._tokens = states.shape[2]
        coefficients = (states - self.fitted[2].float()) @ self._analysis()
        flat = coefficients.transpose(1, 2).flatten(2)  # [blocks, tokens, heads * dim]
        widths = self.fitted[4].flatten()
        parts: list[Tensor] = []
        for number, width in enumerate(self._present()):
            levels = self.fitted[5 + number].float()
            x = flat[..., widths == width]
            parts.extend(join(torch.bucketize(x, (levels[1:] + levels[:-1]) / 2), width))
        return tuple(parts)

    def decode(self, parts: Parts) -> Tensor:
        widths = self.fitted[4]
        heads, dim = widths.shape
        flat = torch.zeros(len(parts[0]), self._tokens, heads * dim, device=parts[0].device)
        for number, width in enumerate(self._present()):
            chosen = widths.flatten() == width
            planes, parts = parts[: len(PLANES[width])], parts[len(PLANES[width]) :]
            codes = split(planes, width, (self._tokens, int(chosen.sum())))
            flat[..., chosen] = self.fitted[5 + number].float()[codes.int()]
        coefficients = flat.view(*flat.shape[:2], heads, dim).transpose(1, 2)
        states: Tensor = coefficients @ self._synthesis() + self.fitted[2].float()
        return states

    def _present(self) -> list[int]:
        return sorted(set(self.fitted[4].flatten().tolist()) - {0})

    def _synthesis(self) -> Tensor:
        """[heads, axes, dim]; rows of axes that are not kept are 0."""
        whole, step, widths = self.fitted[0], self.fitted[1], self.fitted[4]
        basis = torch.zeros(*widths.shape, whole.shape[1], device=whole.device)
        basis[widths > 0] = whole * step.float()[:, None]
        return basis

    def _analysis(self) -> Tensor:
        """[heads, dim, axes]: coefficients of least weighted error, for the basis as it is kept."""
        root = self.fitted[3].float().sqrt()
        basis = self._synthesis() * root[:, None]
        inverse: Tensor = torch.linalg.pinv(basis.double(), rtol=1e-7)
        return root[..., None] * inverse.float()


def _weights(metric: Tensor) -> Tensor:
    """Channels' weights, half precision; of mean 1 and none far below."""
    metric = metric / metric.mean(1, keepdim=True)
    return metric.clamp(1e-3, 6e4).half()


def _widths(power: Tensor, budget: int) -> Tensor:
    """Bits [n] that sum to `budget` and leave axes of such `power` [n] the least error in all.

    The error is convex in the bits of an axis, so the greatest gains are the best.
    """
    gains = _gains(power)
    chosen = gains.flatten().topk(min(budget, gains.numel())).indices
    return torch.bincount(chosen // _MOST, minlength=len(power))


def _gains(power: Tensor) -> Tensor:
    """What each bit saves of the error of axes of such `power`, [..., bits], falling."""
    errors = torch.tensor(_GAUSSIAN, device=power.device)
    return power[..., None] * (errors[:-1] - errors[1:])
