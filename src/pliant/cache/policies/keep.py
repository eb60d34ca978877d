"""Keep every key and value in 16 bits: what policies are measured against."""

from __future__ import annotations

from torch import Tensor

from pliant.cache.policy import STORED, Entries, Layer, Policy, policy


@policy("keep", kind="none", paper="")
class Keep(Policy):
    """Every token, in bfloat16."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        self.kept: Entries | None = None

    def add(self, new: Entries, queries: Tensor) -> None:
        new = Entries(new.keys.to(STORED), new.values.to(STORED), new.positions, new.bias)
        self.kept = new if self.kept is None else Entries.cat([self.kept, new])

    def read(self, queries: Tensor) -> Entries:
        kept, dtype = self.entries, queries.dtype
        return Entries(kept.keys.to(dtype), kept.values.to(dtype), kept.positions, kept.bias)

    @property
    def entries(self) -> Entries:
        """What is kept; there is something from the first chunk on."""
        assert self.kept is not None
        return self.kept

    @property
    def nbytes(self) -> int:
        """Keys and values; positions count up and need no memory."""
        return 0 if self.kept is None else int(self.kept.keys.nbytes + self.kept.values.nbytes)
