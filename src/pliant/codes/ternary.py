"""Ternary: weights of -1, 0 and +1 times a scale a group, five of them in a byte."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pliant.codes.base import Code, Stored, form, one_thread, row_count, row_tiles
from pliant.codes.group_int import GroupScales, clip_group, dequantize, quantize_scales
from pliant.errors import CorruptError, PliantError

TRITS = 5  # in a byte: 3**5 = 243
_TOP = 3**TRITS
_TILE = 1 << 17


@form("ternary")
@dataclass(frozen=True, eq=False)
class Ternary(Code):
    """w = (t - 1) * scale, t in 0, 1, 2, a scale for each `group_size` inputs.

    Byte j of a row holds t[5j] + 3 t[5j + 1] + ... + 81 t[5j + 4]; a row is padded to a whole byte
    and no further. So a weight takes 1.6 bits, against 1.585 of entropy when all three are alike.
    """

    packed: Tensor  # uint8 [out, ceil(in / 5)], each below 243
    stored_scales: GroupScales
    width: int
    group_size: int

    @classmethod
    def pack(
        cls,
        trits: Tensor,  # [out, in] integers in 0 .. 2
        scales: Tensor | GroupScales,  # [out, groups]
        group_size: int = 0,  # 0: one group a row
        scale_bits: int = 16,
    ) -> Ternary:
        out, width = trits.shape
        group_size = clip_group(group_size, width)
        stored = scales if isinstance(scales, GroupScales) else quantize_scales(scales, scale_bits)
        groups = -(-width // group_size)
        if stored.groups != groups or stored.planes[0].shape[0] != out:
            raise PliantError(f"expected scales [{out}, {groups}] for groups of {group_size}")
        if trits.numel() and not 0 <= int(trits.min()) <= int(trits.max()) <= 2:
            raise PliantError("trits must be in 0..2")
        digits = F.pad(trits.to(torch.uint8), (0, -width % TRITS), value=1).view(out, -1, TRITS)
        packed = digits.new_zeros(digits.shape[:2])
        for k in reversed(range(TRITS)):
            packed = packed * 3 + digits[..., k]
        return cls(packed, stored, width, group_size)

    @staticmethod
    def size(out: int, width: int, group_size: int, *, scale_bits: int = 16) -> int:
        """`nbytes` of such a code, without making it."""
        groups = -(-width // clip_group(group_size, width))
        return out * -(-width // TRITS) + GroupScales.size(out, groups, scale_bits)

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape[0], self.width

    def trits(self) -> Tensor:
        """t, uint8 [out, in]."""
        digits = _digits(self.packed.device).to(torch.uint8)[self.packed.to(torch.int64)]
        return digits.flatten(1)[:, : self.width].clone()

    def rows(self, index: slice | Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        count = row_count(index, self.shape[0])
        decoded = torch.empty(count, self.width, dtype=dtype, device=self.device)
        packed, scales = self.packed[index], self.stored_scales.rows(index).scales_as()
        table = _digits(self.device)
        with one_thread():
            for tile in row_tiles(count, self.width, self.device, _TILE):
                values = F.embedding(packed[tile].to(torch.int32), table).flatten(1)
                values = values[:, : self.width].contiguous()
                dequantize(values, scales[tile], 1.0, self.group_size)
                decoded[tile] = values
        return decoded

    def tensors(self) -> dict[str, Tensor]:
        return {"trits": self.packed, **self.stored_scales.tensors()}

    def meta(self) -> dict[str, Any]:
        return {
            "code": self.name,
            "shape": list(self.shape),
            "group_size": self.group_size,
            "scale_bits": self.stored_scales.bits,
        }

    @classmethod
    def build(cls, stored: Stored) -> Ternary:
        out, width = stored.shape()
        group_size = stored.integer("group_size", 1, max(width, 1))
        packed = stored.tensor("trits", (out, -(-width // TRITS)), torch.uint8)
        if packed.numel() and int(packed.max()) >= _TOP:
            raise CorruptError(f"trits holds a byte above {_TOP - 1}, which is no five trits")
        scales = GroupScales.read(stored, out, -(-width // group_size))
        return cls(packed, scales, width, group_size)


def _digits(device: torch.device) -> Tensor:
    """The five base-3 digits of each byte, float32 [243, 5]."""
    byte = torch.arange(_TOP, device=device)[:, None]
    power = 3 ** torch.arange(TRITS, device=device)
    return (byte // power % 3).float()
