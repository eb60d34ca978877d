"""The numbers of greatest magnitude of each token, a bitmap of where they were, and no others.

Source: "Mustafar: Promoting Unstructured Sparsity for KV Cache Pruning in LLM Inference".
"""

from __future__ import annotations

import torch
from torch import Tensor

from pliant.cache.codings.coding import Coding, Exact, Parts, join, nbytes, split
from pliant.errors import PliantError


class Sparse(Coding):
    """`kept` numbers of each token and head, `inner` codes them [.., tokens, kept].

    All rows keep as many, so that no offsets are needed.
    """

    def __init__(self, kept: int, *, inner: Coding | None = None) -> None:
        super().__init__()
        if kept < 1:
            raise PliantError("a token keeps a number or more of each head; ask for less sparsity")
        self.kept, self.inner = kept, inner or Exact()

    def fit(self, sample: Tensor) -> None:
        mask = _largest(sample, self.kept)
        self.inner.fit(sample[mask].view(*sample.shape[:-1], self.kept))

    def encode(self, states: Tensor) -> Parts:
        self._shape = tuple(states.shape[1:])
        mask = _largest(states, self.kept)
        values = states[mask].view(*states.shape[:-1], self.kept)
        return (*join(mask, 1), *self.inner.encode(values))

    def decode(self, parts: Parts) -> Tensor:
        mask = split(parts[:1], 1, self._shape).bool()
        states = torch.zeros(mask.shape, device=mask.device)
        states[mask] = self.inner.decode(parts[1:]).flatten()
        return states

    @property
    def nbytes(self) -> int:
        return nbytes(self.fitted) + self.inner.nbytes


def _largest(states: Tensor, kept: int) -> Tensor:
    """bool, as `states`: the `kept` of greatest magnitude of each row."""
    index = states.abs().topk(kept, dim=-1).indices
    return torch.zeros_like(states, dtype=torch.bool).scatter_(-1, index, True)
