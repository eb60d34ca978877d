"""What policies share that merge tokens into others instead of letting them go."""

from __future__ import annotations

import torch
from torch import Tensor

from pliant.cache.policies.evicting import Evicting
from pliant.cache.policy import STORED, Entries
from pliant.errors import PliantError


class Merging(Evicting):
    """At most `tokens` entries of each key head, of which some stand for several tokens.

    The mark "merged" counts the tokens that an entry took in besides its own. With `counted`, its
    score is raised by the logarithm of all of them: it draws the attention that copies of it would.
    """

    counted = True

    def read(self, queries: Tensor) -> Entries:
        seen = super().read(queries)
        if not self.counted or "merged" not in self.marks:
            return seen
        return Entries(seen.keys, seen.values, seen.positions, self.mark("merged").log1p())

    def merge(self, chosen: Tensor, into: Tensor, shares: Tensor | None = None) -> None:
        """Keep entries `chosen` [kv_heads, m] and add every other to one of them.

        into [kv_heads, n]: which of the chosen takes an entry in, counted along `chosen`; m drops
        it; those of the chosen are ignored. shares [kv_heads, n]: weights of the means, by default
        the tokens an entry stands for.
        """
        entries, slots = self.entries, chosen.shape[1]
        into = into.scatter(1, chosen, torch.arange(slots, device=into.device).expand_as(chosen))
        counts = self.mark("merged") + 1
        shares = counts if shares is None else shares

        def gathered(numbers: Tensor) -> Tensor:  # [kv_heads, n, dim] to [kv_heads, m, dim]
            index = into[..., None].expand_as(numbers)
            sums = numbers.new_zeros(len(numbers), slots + 1, numbers.shape[-1])
            return sums.scatter_add_(1, index, numbers)[:, :slots]

        total = gathered(shares[..., None])
        keys = gathered(entries.keys.float() * shares[..., None]) / total
        values = gathered(entries.values.float() * shares[..., None]) / total
        merged = gathered(counts[..., None])[..., 0] - 1
        self.evict(chosen)
        self.kept = Entries(keys.to(STORED), values.to(STORED), self.entries.positions)
        self.marks["merged"] = merged

    def free(self) -> tuple[int, int]:
        """Entries from here to there are neither first nor recent."""
        return self.sinks, len(self.entries) - self.recent


def cosines(keys: Tensor, others: Tensor) -> Tensor:
    """Cosines between `keys` [heads, n, dim] and `others` [heads, m, dim], [heads, n, m]."""
    unit = torch.nn.functional.normalize(keys.float(), dim=-1)
    return unit @ torch.nn.functional.normalize(others.float(), dim=-1).transpose(-1, -2)


def checked_share(name: str, share: float) -> float:
    """`share`; PliantError unless it lies from 0 to 1."""
    if not 0 <= share <= 1:
        raise PliantError(f"{name} is a share from 0 to 1, not {share}")
    return share
