"""Codes that stay in main memory beside their shard, so that they need not be read back."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pliant.ladder.shard import Extent, join_bytes


class Held:
    """The bytes of extents, at most `limit` of them in all; the first that come stay.

    They are found by all that an extent says, its checksum too: what was written anew in the same
    place is another extent.
    """

    def __init__(self, limit: int) -> None:
        self._left = limit
        self._bytes: dict[Extent, Tensor] = {}

    def get(self, where: Extent) -> Tensor | None:
        """The bytes of `where` [nbytes], if they are held."""
        return self._bytes.get(where)

    def keep(self, where: Extent, content: Mapping[str, Tensor] | Tensor) -> None:
        """Hold the bytes of `where`, or a copy of the tensors that were written there."""
        if where.nbytes > self._left or where in self._bytes:
            return
        self._left -= where.nbytes
        joined = content if isinstance(content, Tensor) else join_bytes(content, where)
        self._bytes[where] = joined

    def forget(self, shard: str | None = None) -> None:
        """Let go of what is held of `shard`; None: of all."""
        for where in [where for where in self._bytes if shard in (None, where.shard)]:
            self._left += self._bytes.pop(where).nbytes
