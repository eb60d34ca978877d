"""Codebook: each weight is an index into the levels of its row or group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pliant.codes.base import Code, Stored, form, row_tiles
from pliant.codes.packing import PLANES, pack, plane_bytes, unpack
from pliant.errors import PliantError


@form("codebook")
@dataclass(frozen=True, eq=False)
class Codebook(Code):
    """w = levels[row, group, index]; one group a row when `group_size` is the width.

    levels: fp16 [out, groups, 2**bits], or [1, groups, 2**bits] when all rows share them.
    """

    planes: tuple[Tensor, ...]  # bit planes of the indices, uint8 [out, bytes]
    levels: Tensor
    width: int
    bit_width: int
    group_size: int

    @classmethod
    def pack(
        cls,
        index: Tensor,  # [out, in] integers in 0 .. 2**bits - 1
        levels: Tensor,  # [out or 1, groups, 2**bits]
        bits: int,
        group_size: int = 0,  # 0: one group a row
    ) -> Codebook:
        out, width = index.shape
        if bits not in PLANES:
            raise PliantError(f"bits must be 1 to 8, not {bits}")
        group_size = min(group_size, width) if group_size > 0 else max(width, 1)
        expected = (-(-width // group_size), 2**bits)
        if tuple(levels.shape[1:]) != expected or levels.shape[0] not in (1, out):
            raise PliantError(
                f"expected levels [{out} or 1, {expected[0]}, {expected[1]}], "
                f"not {list(levels.shape)}"
            )
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < 2**bits:
            raise PliantError(f"indices must be in 0..{2**bits - 1}")
        half = levels.clamp(-65504, 65504).half().contiguous()
        return cls(pack(index, bits), half, width, bits, group_size)

    @property
    def shape(self) -> tuple[int, int]:
        return self.planes[0].shape[0], self.width

    def indices(self) -> Tensor:
        """uint8 [out, in]."""
        return unpack(self.planes, self.bit_width, self.width).clone()

    def rows(self, index: slice | Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        planes = [plane[index] for plane in self.planes]
        count = planes[0].shape[0]
        shared = self.levels.shape[0] == 1
        levels = (self.levels if shared else self.levels[index]).flatten(1)
        levels = levels.expand(count, -1) if shared else levels
        column = torch.arange(self.width, device=self.device)
        offset = column // self.group_size * 2**self.bit_width
        decoded = torch.empty(count, self.width, dtype=dtype, device=self.device)
        for tile in row_tiles(count, self.width, self.device):
            q = unpack([plane[tile] for plane in planes], self.bit_width, self.width)
            decoded[tile] = torch.gather(levels[tile].to(dtype), 1, q.to(torch.int64) + offset)
        return decoded

    def tensors(self) -> dict[str, Tensor]:
        names = [f"index.{plane}" for plane in PLANES[self.bit_width]]
        return {**dict(zip(names, self.planes, strict=True)), "levels": self.levels}

    def meta(self) -> dict[str, Any]:
        return {
            "code": self.name,
            "shape": list(self.shape),
            "bits": self.bit_width,
            "group_size": self.group_size,
            "shared": self.levels.shape[0] != self.shape[0],
        }

    @classmethod
    def build(cls, stored: Stored) -> Codebook:
        out, width = stored.shape()
        bits = stored.integer("bits", 1, 8)
        group_size = stored.integer("group_size", 1, max(width, 1))
        level_rows = 1 if stored.flag("shared") else out
        levels = stored.tensor(
            "levels", (level_rows, -(-width // group_size), 2**bits), torch.float16
        )
        planes = tuple(
            stored.tensor(f"index.{plane}", (out, plane_bytes(width, plane)), torch.uint8)
            for plane in PLANES[bits]
        )
        return cls(planes, levels, width, bits, group_size)
