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

from pliant.cache.codings.coding import Coding, Parts, check_bits, join, split
from pliant.codes.packing import PLANES, pack, unpack
from pliant.errors import PliantError
from pliant.methods.numerics import kmeans_rows

_MOST = 8
# Mean squared error of the best levels for a Gaussian of variance 1, by bits (Max, 1960; from 6
# bits on by the Panter-Dite formula).
_GAUSSIAN = (1.0, 0.3634, 0.1175, 0.03454, 0.009497, 0.002499, 6.64e-4, 1.66e-4, 4.15e-5)
_SAMPLE = 1 << 15  # numbers that levels of a width are fitted on


class Transform(Coding):
    """`bits` a number on average over all heads.

    metric: set before `fit`, [kv_heads, dim], what a channel's squared error costs; None: 1. Kept
    of a fit: rows of the basis in `basis_bits`, a scale for each, channels' means and weights,
    widths, levels. joint: axes run through all heads, which are alike; the basis takes more bytes.
    A coarse basis is no error of its own, but what is left of large axes then costs bits of small
    ones: many bits ask for 6 to 8 in the basis.
    """

    def __init__(self, bits: float, *, joint: bool = True, basis_bits: int = 5) -> None:
        super().__init__()
        check_bits(basis_bits)
        if not 0 < bits <= _MOST:
            raise PliantError(f"an average is above 0 and at most {_MOST} bits, not {bits}")
        self.bits, self.joint, self.basis_bits = bits, joint, basis_bits
        self.metric: Tensor | None = None

    def fit(self, sample: Tensor) -> None:
        self._heads = len(sample)
        sample = self._folded(sample[None])[0]
        heads, _, dim = sample.shape
        mean, weight, power, axes = self._axes(sample)
        centred = sample - mean.float()
        root = weight.float().sqrt()[:, None]
        widths = _widths(power.flatten(), round(self.bits * heads * dim)).view(heads, dim)
        # rows of unit variance, so that one table serves many
        basis = power.sqrt()[..., None] * axes.mT.float() / root  # [heads, axes, dim]
        kept = widths > 0
        rows, most = basis[kept], 2 ** (self.basis_bits - 1) - 1
        step = (rows.abs().amax(1, keepdim=True) / most).clamp(min=1e-7).half()
        whole = (rows / step.float()).round().clamp(-most, most) + most
        planes = pack(whole, self.basis_bits)
        self.fitted = (widths.to(torch.uint8), mean, weight, step, *planes)
        self._tables = len(self.fitted)
        flat = (centred @ self._analysis()).transpose(0, 1).flatten(1)
        for width in self._present():
            x = flat[:, widths.flatten() == width].flatten().contiguous()
            x = x[:: max(1, len(x) // _SAMPLE)]
            levels = kmeans_rows(x[None], torch.ones_like(x)[None], 2**width)[0][0]
            self.fitted = (*self.fitted, levels.half())

    def _axes(self, sample: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Channels' means and weights (half), power [kv_heads, axes] and axes' directions."""
        mean = sample.mean(1, keepdim=True).half()
        weight = torch.ones_like(mean[:, 0])
        if self.metric is not None:
            weight = _weights(self._cost(self.metric))
        scaled = ((sample - mean.float()) * weight.float().sqrt()[:, None]).double()
        power, axes = torch.linalg.eigh(scaled.mT @ scaled / sample.shape[1])
        return mean, weight, power.clamp(min=1e-12).float(), axes

    def encode(self, states: Tensor) -> Parts:
        self._tokens = states.shape[2]
        coefficients = (self._folded(states) - self.fitted[1].float()) @ self._analysis()
        flat = coefficients.transpose(1, 2).flatten(2)  # [blocks, tokens, axes of all heads]
        widths = self._widths.flatten()
        parts: list[Tensor] = []
        for number, width in enumerate(self._present()):
            levels = self.fitted[self._tables + number].float()
            x = flat[..., widths == width]
            parts.extend(join(torch.bucketize(x, (levels[1:] + levels[:-1]) / 2), width))
        return tuple(parts)

    def decode(self, parts: Parts) -> Tensor:
        widths = self._widths
        heads, dim = widths.shape
        flat = torch.zeros(len(parts[0]), self._tokens, heads * dim, device=parts[0].device)
        for number, width in enumerate(self._present()):
            chosen = widths.flatten() == width
            planes, parts = parts[: len(PLANES[width])], parts[len(PLANES[width]) :]
            codes = split(planes, width, (self._tokens, int(chosen.sum())))
            flat[..., chosen] = self.fitted[self._tables + number].float()[codes.int()]
        coefficients = flat.view(*flat.shape[:2], heads, dim).transpose(1, 2)
        states: Tensor = coefficients @ self._synthesis() + self.fitted[1].float()
        if self.joint:
            return states.view(*flat.shape[:2], self._heads, -1).transpose(1, 2)
        return states

    @property
    def _widths(self) -> Tensor:
        """uint8 [kv_heads or 1, axes]."""
        return self.fitted[0]

    def _folded(self, states: Tensor) -> Tensor:
        """`states` [blocks, kv_heads, tokens, dim], all heads as one if they are coded together."""
        return states.transpose(1, 2).flatten(2)[:, None] if self.joint else states

    def _cost(self, metric: Tensor) -> Tensor:
        return metric.reshape(1, -1) if self.joint else metric

    def _present(self) -> list[int]:
        return sorted(set(self._widths.flatten().tolist()) - {0})

    def _synthesis(self) -> Tensor:
        """[heads, axes, dim]; rows of axes that are not kept are 0."""
        widths, step = self._widths, self.fitted[3]
        dim = widths.shape[1]
        whole = unpack(self.fitted[4 : self._tables], self.basis_bits, dim).float()
        basis = torch.zeros(*widths.shape, dim, device=whole.device)
        basis[widths > 0] = (whole - (2 ** (self.basis_bits - 1) - 1)) * step.float()
        return basis

    def _analysis(self) -> Tensor:
        """[heads, dim, axes]: coefficients of least weighted error, for the basis as it is kept."""
        root = self.fitted[2].float().sqrt()
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
    errors = torch.tensor(_GAUSSIAN, device=power.device)
    gains = power[:, None] * (errors[:-1] - errors[1:])  # [n, bits], falling along bits
    chosen = gains.flatten().topk(min(budget, gains.numel())).indices
    return torch.bincount(chosen // _MOST, minlength=len(power))
