"""CItruS: Chunked Instruction-aware State Eviction for Long Sequence Modeling.

What keeps perplexity can lose what the task needs. The text is read in chunks, and after each the
instruction's queries, asked as if they came next, say which states stay.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pliant.cache.policies.evicting import Evicting
from pliant.cache.policy import STORED, Entries, Layer, policy


@policy("citrus", kind="evict", paper="CItruS: Chunked Instruction-aware State Eviction")
class CItruS(Evicting):
    """The tokens that the instruction's queries attend to.

    instruction: so many first tokens of the text are the instruction; 0 takes the last `window`
    tokens in its place, which the next text goes on from.
    """

    def __init__(
        self,
        layer: Layer,
        *,
        tokens: int = 512,
        recent: int = 32,
        sinks: int = 4,
        instruction: int = 0,
        window: int = 16,
    ) -> None:
        super().__init__(layer, tokens=tokens, recent=recent, sinks=max(sinks, instruction))
        self.instruction, self.window = instruction, window
        self.asking: Tensor | None = None  # queries [heads, n, key_dim]
        self._next = 0
        if instruction:
            self.needs_rotary()

    def add(self, new: Entries, queries: Tensor) -> None:
        super().add(new, queries)
        self._next += queries.shape[1]
        asking = queries.to(STORED)
        if self.asking is not None:
            asking = torch.cat([self.asking, asking], 1)
        if self.instruction:
            self.asking = asking[:, : self.instruction].clone()
        else:
            self.asking = asking[:, -self.window :].clone()

    def importance(self) -> Tensor:
        """Attention of all that is asked."""
        assert self.asking is not None
        asking, keys = self.asking.float(), self.entries.keys.float()
        if self.instruction:  # it is at the beginning, and is asked at the end
            by = torch.full(asking.shape[:2], self._next, device=asking.device)
            asking = self.needs_rotary().shift(asking, by)
        asking = asking.reshape(len(keys), -1, asking.shape[-1])
        return (asking @ keys.transpose(1, 2) * self.layer.scale).softmax(-1).sum(1)

    @property
    def nbytes(self) -> int:
        return super().nbytes + (0 if self.asking is None else int(self.asking.nbytes))
