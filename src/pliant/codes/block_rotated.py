"""BlockRotated: a code in a basis of its inputs that stored orthogonal blocks turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pliant.codes.base import Code, Stored, form, prefixed
from pliant.errors import PliantError

LARGEST = 64


@form("block_rotated")
@dataclass(frozen=True, eq=False)
class BlockRotated(Code):
    """W = inner R^-1 with R block diagonal and near orthogonal, so that W x = inner (R^-1 x).

    blocks: what an activation's blocks are multiplied by from the right, fp16 [n, b, b], of at
    most 64 x 64; one block [1, b, b] serves all. tail: the block of the inputs that are left over,
    [r, r] with r = width % b. The activation's map is stored and is exactly what decoding uses, so
    that rounding it to 16 bits makes no error: `turn` inverts the rounded blocks.
    """

    inner: Code
    blocks: Tensor
    tail: Tensor

    @classmethod
    def by(cls, inner: Code, blocks: Tensor, tail: Tensor | None = None) -> BlockRotated:
        """Blocks of any float dtype, [n, b, b]; tail [r, r], needed when b does not divide."""
        size, width = blocks.shape[-1], inner.shape[1]
        tail = blocks.new_zeros(0, 0) if tail is None else tail
        wanted = (width // size or 1, 1)
        if blocks.dim() != 3 or blocks.shape[1] != size or not 1 <= size <= LARGEST:
            raise PliantError(f"blocks must be [n, b, b] with b up to {LARGEST}")
        if blocks.shape[0] not in wanted or tuple(tail.shape) != (width % size, width % size):
            raise PliantError(
                f"blocks {tuple(blocks.shape)} and a tail {tuple(tail.shape)} do not turn "
                f"{width} inputs"
            )
        return cls(inner, blocks.half().contiguous(), tail.half().contiguous())

    def rotate(self, x: Tensor) -> Tensor:
        """What an activation [..., in] becomes, float32."""
        return apply_blocks(x, self.blocks, self.tail)

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    def rows(self, index: slice | Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        # y = (x R) inner^T, so that the matrix is inner R^T.
        turned = self.blocks.transpose(-1, -2), self.tail.t()
        return apply_blocks(self.inner.rows(index), *turned).to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        return prefixed("inner", self.inner) | {"blocks": self.blocks, "tail": self.tail}

    def meta(self) -> dict[str, Any]:
        return {
            "code": self.name,
            "inner": self.inner.meta(),
            "block": self.blocks.shape[-1],
            "shared": self.blocks.shape[0] == 1,
        }

    @classmethod
    def build(cls, stored: Stored) -> BlockRotated:
        inner = stored.code("inner")
        width, size = inner.shape[1], stored.integer("block", 1, LARGEST)
        count = 1 if stored.flag("shared") else width // size
        rest = width % size
        blocks = stored.tensor("blocks", (count, size, size), torch.float16)
        return cls(inner, blocks, stored.tensor("tail", (rest, rest), torch.float16))


def apply_blocks(x: Tensor, blocks: Tensor, tail: Tensor) -> Tensor:
    """x [..., in] times the block diagonal matrix, float32. Blocks as in `BlockRotated`."""
    x = x.float()
    size = blocks.shape[-1]
    whole = x.shape[-1] // size * size
    lead = x.shape[:-1]
    parts = x[..., :whole].reshape(*lead, whole // size, 1, size)
    turned = (parts @ blocks.float()).reshape(*lead, whole)
    if whole == x.shape[-1]:
        return turned
    return torch.cat([turned, x[..., whole:] @ tail.float()], -1)


def turn(weight: Tensor, blocks: Tensor, tail: Tensor) -> Tensor:
    """The inner matrix [out, in] with which `blocks`, as stored in fp16, decode to `weight`."""
    inverses = torch.linalg.inv(blocks.half().double()).transpose(-1, -2)
    rest = torch.linalg.inv(tail.half().double()).t() if tail.numel() else tail
    return apply_blocks(weight, inverses.float(), rest.float())
