"""LM-Infinite: Simple On-the-Fly Length Generalization for Large Language Models.

Long texts show a model three things it was not trained on: more tokens than it knows, distances
that it never saw, and beginnings out of sight. A mask in the shape of a lambda leaves the first
tokens and the recent ones, and no distance is greater than a limit.
"""

from __future__ import annotations

from torch import Tensor

from pliant.cache.policies.evicting import Evicting
from pliant.cache.policy import Entries, Layer, policy
from pliant.errors import PliantError


@policy("lm_infinite", kind="window", paper="LM-Infinite: Simple On-the-Fly Length Generalization")
class LMInfinite(Evicting):
    """The first tokens and the recent ones, no farther away than a limit.

    distance: the limit, the length that the model was trained on. It holds for the last query of a
    chunk, and those before it are nearer.
    """

    def __init__(
        self, layer: Layer, *, tokens: int = 512, sinks: int = 10, distance: int = 2048
    ) -> None:
        super().__init__(layer, tokens=tokens, recent=max(tokens - sinks - 1, 1), sinks=sinks)
        self.distance = distance
        self.needs_rotary()

    def add(self, new: Entries, queries: Tensor) -> None:
        if len(new) > self.distance:
            raise PliantError(
                f"a chunk of {len(new)} tokens reaches farther than {self.distance}, the limit of "
                "distances; give shorter chunks"
            )
        super().add(new, queries)

    def read(self, queries: Tensor) -> Entries:
        seen = super().read(queries)
        last = seen.positions[:, -1:]
        by = (last - seen.positions - self.distance).clamp_min(0)
        if not by.any():
            return seen
        keys = self.needs_rotary().shift(seen.keys, by)
        return Entries(keys, seen.values, seen.positions, seen.bias)

    def importance(self) -> Tensor:
        return self.entries.positions.float()

    @property
    def nbytes(self) -> int:
        """Keys and values: positions are those of the first and of the last tokens."""
        return 0 if self.kept is None else int(self.kept.keys.nbytes + self.kept.values.nbytes)
