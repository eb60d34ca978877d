"""Codes that stay in memory beside their shard, so that they need not be read back."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pliant.ladder.shard import Extent


class Held:
    """The tensors of extents; the first that come stay.

    limits: bytes by type of device ("cpu", "cuda"); what one has no room for goes to main memory.
    They are found by all that an extent says, its checksum too: what was written anew in the same
    place is another extent.
    """

    def __init__(self, limits: Mapping[str, int]) -> None:
        self._left = dict(limits)
        self._tensors: dict[Extent, tuple[str, dict[str, Tensor]]] = {}

    def get(self, where: Extent) -> dict[str, Tensor] | None:
        """The tensors of `where`, if they are held."""
        found = self._tensors.get(where)
        return None if found is None else dict(found[1])

    def keep(self, where: Extent, tensors: Mapping[str, Tensor]) -> None:
        """Hold the tensors of `where`, which nobody changes any more."""
        if where in self._tensors or not tensors:
            return
        kind = next(iter(tensors.values())).device.type
        if where.nbytes > self._left.get(kind, 0):
            kind = "cpu"
        if where.nbytes > self._left.get(kind, 0):
            return
        self._left[kind] -= where.nbytes
        self._tensors[where] = kind, {n: _alone(t, kind) for n, t in tensors.items()}

    def forget(self, shard: str | None = None) -> None:
        """Let go of what is held of `shard`; None: of all."""
        for where in [where for where in self._tensors if shard in (None, where.shard)]:
            kind, _ = self._tensors.pop(where)
            self._left[kind] += where.nbytes


def _alone(tensor: Tensor, kind: str) -> Tensor:
    """The tensor in one piece, in main memory if `kind` is "cpu", without what it is a view of."""
    tensor = tensor.detach()
    tensor = (tensor.cpu() if kind == "cpu" else tensor).contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
