"""What policies share that keep so many tokens and let the others go."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from pliant.cache.policies.keep import Keep
from pliant.cache.policy import Layer
from pliant.errors import PliantError

_POSITION_BYTES = 4  # an entry's position as int32: those that stay do not count up


class Evicting(Keep):
    """At most `tokens` tokens of each key head; the first `sinks` and the last `recent` stay.

    What a policy remembers of each token it keeps in `marks`, [kv_heads, entries] each: new tokens
    start at 0 and marks go with their token.
    """

    def __init__(
        self, layer: Layer, *, tokens: int = 512, recent: int = 32, sinks: int = 4
    ) -> None:
        super().__init__(layer)
        if not 0 < recent + sinks < tokens:
            raise PliantError(
                f"a cache of {tokens} tokens cannot keep {sinks} first and {recent} recent ones "
                "and choose among others; give more tokens"
            )
        self.tokens, self.recent, self.sinks = tokens, recent, sinks
        self.marks: dict[str, Tensor] = {}

    @abstractmethod
    def importance(self) -> Tensor:
        """How much each entry is worth keeping, [kv_heads, entries]; higher stays."""

    def mark(self, name: str) -> Tensor:
        """A mark of every entry, float32 [kv_heads, entries], to be changed in place."""
        size = self.entries.positions.shape
        known = self.marks.get(name)
        if known is None or known.shape != size:
            fresh = torch.zeros(size, device=self.entries.keys.device)
            if known is not None:
                fresh[:, : known.shape[1]] = known
            self.marks[name] = fresh
        return self.marks[name]

    def fade(self, name: str, weights: Tensor, window: int) -> Tensor:
        """Add attention weights [heads, n, entries] to a mark that forgets; the mark.

        A query counts 1, the one before it 1 - 1 / window, and so on: about the last `window`
        queries, in one number an entry, and the same however the text is cut into chunks.
        """
        keep, count = 1 - 1 / window, weights.shape[1]
        ages = torch.arange(count - 1, -1, -1, device=weights.device)
        fresh = torch.einsum("hte,t->he", self.per_kv_head(weights), torch.pow(keep, ages).float())
        return self.mark(name).mul_(keep**count).add_(fresh)

    def settle(self) -> None:
        count = len(self.entries)
        if count > self.tokens:
            self.evict(self.choose(self.importance()))

    def choose(self, worth: Tensor) -> Tensor:
        """The `tokens` entries worth most, the first and the recent before all, in order."""
        worth = worth.clone()
        worth[:, : self.sinks] = torch.inf  # entries are in order of position
        worth[:, len(self.entries) - self.recent :] = torch.inf
        return worth.topk(self.tokens, dim=1).indices.sort(1).values

    def evict(self, chosen: Tensor) -> None:
        """Keep entries `chosen` [kv_heads, m] alone, which rise along each head."""
        marks = {name: self.mark(name) for name in self.marks}
        self.kept = self.entries.take(chosen)
        self.marks = {name: mark.gather(1, chosen) for name, mark in marks.items()}

    @property
    def nbytes(self) -> int:
        if self.kept is None:
            return 0
        positions = _POSITION_BYTES * self.kept.positions.numel()
        return super().nbytes + positions + sum(int(mark.nbytes) for mark in self.marks.values())
