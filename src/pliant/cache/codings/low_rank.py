"""Fewer channels: coefficients in a basis of each head's first tokens, coded further or not.

Source: "CSKV: Training-Efficient Channel Shrinking for KV Cache in Long-Context Scenarios".
"""

from __future__ import annotations

import torch
from torch import Tensor

from pliant.cache.codings.coding import Coding, Exact, Parts, nbytes
from pliant.errors import PliantError


class LowRank(Coding):
    """The leading `rank` right singular vectors of the sample; `inner` codes the coefficients.

    joint: one basis over the channels of all heads, at rank times heads, not one a head.
    """

    def __init__(self, rank: int, *, joint: bool = False, inner: Coding | None = None) -> None:
        super().__init__()
        if rank < 1:
            raise PliantError(f"a rank is 1 or more, not {rank}")
        self.rank, self.joint, self.inner = rank, joint, inner or Exact()

    def fit(self, sample: Tensor) -> None:
        self._heads = len(sample)
        states = self._folded(sample[None])[0]
        rank = self.rank * (self._heads if self.joint else 1)
        moment = states.double().transpose(1, 2) @ states.double()
        vectors = torch.linalg.eigh(moment).eigenvectors[..., -rank:].flip(-1)
        self.fitted = (vectors.to(torch.bfloat16).contiguous(),)  # [heads or 1, dim, rank]
        self.inner.fit(states @ self._basis)

    def encode(self, states: Tensor) -> Parts:
        # rounded vectors are not orthonormal to the last bit, so coefficients are solved for
        basis = self._basis
        coefficients = self._folded(states) @ basis @ torch.linalg.pinv(basis.mT @ basis)
        return self.inner.encode(coefficients)

    def decode(self, parts: Parts) -> Tensor:
        states: Tensor = self.inner.decode(parts) @ self._basis.mT
        if self.joint:  # [blocks, 1, tokens, heads * dim]
            return states.view(len(states), states.shape[2], self._heads, -1).transpose(1, 2)
        return states

    @property
    def nbytes(self) -> int:
        return nbytes(self.fitted) + self.inner.nbytes

    @property
    def _basis(self) -> Tensor:
        return self.fitted[0].float()

    def _folded(self, states: Tensor) -> Tensor:
        return states.transpose(1, 2).flatten(2)[:, None] if self.joint else states
