"""Product quantization: a code for a few neighbouring channels together, from fitted codebooks.

Source: "MILLION: Mastering Long-Context LLM Inference Via Outlier-Immunized KV Product
Quantization".
"""

from __future__ import annotations

import torch
from torch import Tensor

from pliant.cache.codings.coding import Coding, Parts, join, split
from pliant.codes.packing import PLANES
from pliant.errors import PliantError

_TILE = 1 << 22  # distances at once


class Product(Coding):
    """`bits` a number: sub-vectors of `sub` channels, 2**(bits * sub) entries a codebook.

    Channels are brought to mean 0 and deviation 1 first, so that one codebook serves all heads
    and channels of a layer; own: one for each sub-vector of each head instead, as published,
    which asks for calibration text far longer than what a sequence begins with.
    """

    def __init__(
        self, bits: int, *, sub: int = 2, own: bool = False, rounds: int = 10, sample: int = 8192
    ) -> None:
        super().__init__()
        if not 1 <= bits * sub <= 8:
            raise PliantError(f"codes of {sub} numbers of {bits} bits do not fit a byte")
        self.bits, self.sub, self.own = bits * sub, sub, own
        self.rounds, self.sample = rounds, sample

    def fit(self, sample: Tensor) -> None:
        if sample.shape[-1] % self.sub:
            raise PliantError(f"{sample.shape[-1]} channels are no multiple of {self.sub}")
        self._shape = tuple(sample.shape)
        mean = sample.mean(1, keepdim=True).half()
        deviation = sample.std(1, keepdim=True).clamp(1e-4, 6e4).half()
        self.fitted = (torch.empty(0), mean, deviation)
        vectors = self._vectors(sample[None])  # [books, n, sub]
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(vectors.shape[1], generator=generator)[: self.sample]
        vectors = vectors[:, order.to(vectors.device)]
        entries = 2**self.bits
        count = vectors.shape[1]
        books = vectors[:, torch.arange(entries, device=vectors.device) % count].clone()
        for _ in range(self.rounds):
            near = _nearest(vectors, books).long()
            ones = torch.ones_like(near, dtype=vectors.dtype)
            held = torch.zeros_like(books[..., 0]).scatter_add_(1, near, ones)
            index = near[..., None].expand_as(vectors)
            sums = torch.zeros_like(books).scatter_add_(1, index, vectors)
            books = torch.where(held[..., None] > 0, sums / held[..., None].clamp(min=1), books)
        self.fitted = (books.half(), mean, deviation)

    def encode(self, states: Tensor) -> Parts:
        self._tokens = states.shape[2]
        near = _nearest(self._vectors(states), self.fitted[0].float())
        if self.own:  # [heads * subs, blocks * tokens]
            near = near.view(*self._grid, len(states), -1).permute(2, 0, 3, 1)
        return join(near.reshape(len(states), -1), self.bits)

    def decode(self, parts: Parts) -> Tensor:
        books, mean, deviation = (part.float() for part in self.fitted)
        heads, subs = self._grid
        codes = split(parts[: len(PLANES[self.bits])], self.bits, (heads, self._tokens, subs))
        if self.own:
            each = torch.arange(heads * subs, device=codes.device).view(heads, 1, subs)
            found = books[each, codes.long()]
        else:
            found = books[0][codes.long()]
        states: Tensor = found.flatten(-2) * deviation + mean
        return states

    @property
    def _grid(self) -> tuple[int, int]:
        """Heads, and sub-vectors of a head."""
        return self._shape[0], self._shape[2] // self.sub

    def _vectors(self, states: Tensor) -> Tensor:
        """[books, n, sub] of `states` [blocks, heads, tokens, dim]."""
        _, mean, deviation = (part.float() for part in self.fitted)
        vectors = (states - mean) / deviation
        vectors = vectors.reshape(*states.shape[:-1], -1, self.sub)
        if not self.own:
            return vectors.reshape(1, -1, self.sub)
        return vectors.permute(1, 3, 0, 2, 4).reshape(-1, states.shape[0] * states.shape[2],
                                                      self.sub)  # fmt: skip


def _nearest(vectors: Tensor, books: Tensor) -> Tensor:
    """uint8 [books, n]: the nearest entry of each vector's book [books, entries, sub]."""
    half = books.square().sum(-1)[:, None] / 2
    step = max(1, _TILE // (books.shape[0] * books.shape[1]))
    found = [
        torch.baddbmm(half, part, books.mT, alpha=-1).argmin(-1).to(torch.uint8)
        for part in torch.split(vectors, step, 1)
    ]
    return torch.cat(found, 1)
