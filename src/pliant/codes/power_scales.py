"""Scales that are powers of two, alone or times one fp16 factor a row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pliant.codes.base import Stored
from pliant.codes.group_int import plane_names, stored_planes
from pliant.codes.packing import pack, unpack
from pliant.errors import PliantError

_BIAS = 127  # of a float32 exponent
_LOWEST, _HIGHEST = 1, 254  # biased exponents of normal float32 numbers


@dataclass(frozen=True, eq=False)
class PowerScales:
    """scale = 2**(q + base - 127) * row_scale, q an integer of `bits` bits for each group.

    With 8 bits, base 0 and no row_scale a scale is one E8M0 byte, as in the OCP MX formats.
    """

    planes: tuple[Tensor, ...]  # bit planes of q, uint8 [out, bytes]
    row_scale: Tensor | None  # [out] fp16
    bits: int
    groups: int
    base: int

    def scales_as(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The scales that decoding will use, [out, groups]."""
        biased = unpack(self.planes, self.bits, self.groups).to(torch.int32) + self.base
        # A float32 of an empty mantissa is exact, which exp2 does not promise.
        scales = (biased.clamp_(_LOWEST, _HIGHEST) << 23).view(torch.float32)
        if self.row_scale is not None:
            scales = scales * self.row_scale.float()[:, None]
        return scales.to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        stored = dict(zip(plane_names("exponents", self.bits), self.planes, strict=True))
        return stored if self.row_scale is None else stored | {"row_scale": self.row_scale}

    def rows(self, index: slice | Tensor) -> PowerScales:
        row_scale = None if self.row_scale is None else self.row_scale[index]
        planes = tuple(plane[index] for plane in self.planes)
        return PowerScales(planes, row_scale, self.bits, self.groups, self.base)

    @classmethod
    def read(cls, stored: Stored, out: int, groups: int) -> PowerScales:
        """The scales that a code's meta and tensors describe."""
        bits = stored.integer("scale_bits", 1, 8)
        row_scale = (
            stored.tensor("row_scale", (out,), torch.float16) if stored.flag("row_scale") else None
        )
        planes = stored_planes(stored, "exponents", bits, out, groups)
        return cls(planes, row_scale, bits, groups, stored.integer("base", 0, _HIGHEST))


def power_scales(
    exponents: Tensor,  # [out, groups] integers: scale = 2**exponent
    bits: int = 8,
    row_scale: Tensor | None = None,  # [out] > 0
) -> PowerScales:
    """Store exponents; those more than 2**bits - 1 below the largest one are raised to that."""
    if not 1 <= bits <= 8:
        raise PliantError(f"exponents take 1 to 8 bits, not {bits}")
    biased = (exponents.to(torch.int32) + _BIAS).clamp(_LOWEST, _HIGHEST)
    top = 2**bits - 1
    base = 0 if bits == 8 or not biased.numel() else max(int(biased.max()) - top, 0)
    planes = pack((biased - base).clamp(0, top).to(torch.uint8), bits)
    half = None if row_scale is None else row_scale.float().clamp(2.0**-24, 65504.0).half()
    return PowerScales(planes, half, bits, exponents.shape[1], base)
