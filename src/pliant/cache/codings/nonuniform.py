"""Levels fitted to the sequence's first tokens, and what they do not reach kept aside.

Source: "KVQuant: Towards 10 Million Context Length LLM Inference with KV Cache Quantization".
"""

from __future__ import annotations

import torch
from torch import Tensor

from pliant.cache.codings.coding import Coding, Parts, check_bits, join, split
from pliant.codes.packing import PLANES
from pliant.methods.numerics import kmeans_rows


class Nonuniform(Coding):
    """x = shift + scale * level: 2**bits levels of the layer, fitted by k-means.

    per_channel: shift and scale of each channel, fitted once from the sample's quantiles; else of
    each token over the channels of all heads. outliers: the share of a block (per channel), or of
    a token, that is furthest outside its range and is kept exact in bfloat16 with an index.
    uniform: equal steps instead of fitted levels. q_norm: move levels so that what is coded keeps
    its mean and deviation. weights: k-means counts a channel by its scale squared and `importance`.
    """

    def __init__(
        self,
        bits: int,
        *,
        per_channel: bool,
        outliers: float = 0.01,
        uniform: bool = False,
        q_norm: bool = False,
    ) -> None:
        super().__init__()
        check_bits(bits)
        self.bits, self.per_channel, self.outliers = bits, per_channel, outliers
        self.uniform, self.q_norm = uniform, q_norm
        self.importance: Tensor | None = None

    def fit(self, sample: Tensor) -> None:
        heads, _, dim = sample.shape
        states = sample.transpose(0, 1).flatten(1)  # [n, heads * dim]
        channel: Parts = ()
        if self.per_channel:
            cut = self.outliers / 2
            ends = torch.tensor([cut, 1 - cut], device=sample.device)
            low, high = states.quantile(ends, dim=0)
            shift, scale = _halves(low, high)
            channel = (shift, scale)
            weights = scale.float().square().expand_as(states)
            if self.importance is not None:
                weights = weights * self.importance.flatten()
            normal = (states - shift.float()) / scale.float()
            inside = normal.abs() <= 1.001
        else:
            shift, scale, index = self._of_tokens(states[:, None])
            normal = ((states[:, None] - shift) / scale)[:, 0]
            weights = scale.float().square()[:, 0].expand_as(states)
            inside = torch.ones_like(states, dtype=torch.bool).scatter_(1, index[:, 0], False)
        self.fitted = (self._levels(normal[inside], weights[inside]), *channel)
        self._heads, self._dim = heads, dim

    def encode(self, states: Tensor) -> Parts:
        self._tokens = tokens = states.shape[2]
        scales: Parts = ()
        rows = states.transpose(1, 2).flatten(2)  # [blocks, tokens, heads * dim]
        if self.per_channel:
            shift, scale = (part.float() for part in self.fitted[1:])
            normal = (rows - shift) / scale
            flat = (normal.abs() * scale).flatten(1).where(normal.flatten(1).abs() > 1, 0)
            index = flat.topk(self._count(flat.shape[1]), dim=1).indices
            kept = rows.flatten(1).gather(1, index)
        else:
            shift, scale, index = self._of_tokens(rows)
            normal = (rows - shift.float()) / scale.float()
            kept, scales = rows.gather(2, index), (shift, scale)
        levels = self.fitted[0].float()
        codes = torch.bucketize(normal, (levels[1:] + levels[:-1]) / 2)
        width = rows.shape[2] if not self.per_channel else tokens * rows.shape[2]
        aside = (_stored(index, width), kept.to(torch.bfloat16)) if index.shape[-1] else ()
        return (*join(codes, self.bits), *scales, *aside)

    def decode(self, parts: Parts) -> Tensor:
        planes = len(PLANES[self.bits])
        shape = (self._tokens, self._heads * self._dim)
        levels = self.fitted[0].float()
        states = levels[split(parts[:planes], self.bits, shape).int()]
        rest = parts[planes:]
        if self.per_channel:
            shift, scale = (part.float() for part in self.fitted[1:])
        else:
            shift, scale, rest = rest[0].float(), rest[1].float(), rest[2:]
        states = states * scale + shift
        if rest:
            index, kept = _index(rest[0]), rest[1].float()
            if self.per_channel:
                states = states.flatten(1).scatter_(1, index, kept).view(states.shape)
            else:
                states.scatter_(2, index, kept)
        return states.view(*states.shape[:2], self._heads, self._dim).transpose(1, 2)

    def _count(self, width: int) -> int:
        return round(self.outliers * width)

    def _of_tokens(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Shift and scale float16 [..., 1] of `rows` [..., width], and who is kept aside."""
        count = self._count(rows.shape[-1])
        middle = (rows.amax(-1, keepdim=True) + rows.amin(-1, keepdim=True)) / 2
        centre = rows.median(-1, keepdim=True).values if count else middle
        index = (rows - centre).abs().topk(count, dim=-1).indices
        high = rows.scatter(-1, index, -torch.inf).amax(-1, keepdim=True)
        low = rows.scatter(-1, index, torch.inf).amin(-1, keepdim=True)
        return *_halves(low, high), index

    def _levels(self, x: Tensor, weights: Tensor) -> Tensor:
        """[2**bits] rising levels in -1..1 for numbers `x`, float16."""
        count = 2**self.bits
        if self.uniform:
            levels = torch.linspace(-1, 1, count, device=x.device)
        else:
            levels = kmeans_rows(x[None], weights[None], count)[0][0]
        if self.q_norm:
            near = levels[torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)]
            levels = (levels - near.mean()) * (x.std() / near.std().clamp(min=1e-6)) + x.mean()
        return levels.half()


def _halves(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Middle and half width of ranges, float16; a width is never 0."""
    limit = torch.finfo(torch.float16).max
    shift = ((low + high) / 2).clamp(-limit, limit).half()
    reach = torch.maximum(high - shift.float(), shift.float() - low)
    return shift, reach.clamp(1e-6, limit).half()


def _stored(index: Tensor, width: int) -> Tensor:
    """Indices below `width` in one byte or two."""
    if width <= 256:
        return index.to(torch.uint8)
    return (index - 32768).to(torch.int16) if width <= 65536 else index.int()


def _index(stored: Tensor) -> Tensor:
    return stored.long() + (32768 if stored.dtype == torch.int16 else 0)
