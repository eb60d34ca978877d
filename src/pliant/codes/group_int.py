"""Group integers: 1 to 8 bits a weight, one scale (and zero point) a group along `in`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pliant.codes.base import Code, Stored, form, one_thread, row_count, row_tiles
from pliant.codes.packing import PLANES, pack, packed_nbytes, plane_bytes, unpack
from pliant.errors import CorruptError, PliantError

_HALF_MAX = 65_504.0
_TILE = 1 << 18  # elements decoded at once: 1 MiB of float32, so that calls cost little beside work


@dataclass(frozen=True, eq=False)
class GroupScales:
    """Scales as stored: fp16, or packed integers times row_scale / 2**bits.

    planes: one fp16 [out, groups] when bits is 16, else the bit planes of the integers. The
    division keeps row_scale near the largest scale, where fp16 is still precise.
    """

    planes: tuple[Tensor, ...]
    row_scale: Tensor | None  # [out] fp16
    bits: int
    groups: int

    def scales_as(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The scales that decoding will use, [out, groups]."""
        if self.row_scale is None:
            return self.planes[0].to(dtype)
        integers = unpack(self.planes, self.bits, self.groups).float()
        return (integers * (self.row_scale.float() * 2.0**-self.bits)[:, None]).to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        if self.row_scale is None:
            return {"scales": self.planes[0]}
        named = zip(plane_names("scales", self.bits), self.planes, strict=True)
        return {**dict(named), "row_scale": self.row_scale}

    def rows(self, index: slice | Tensor) -> GroupScales:
        row_scale = None if self.row_scale is None else self.row_scale[index]
        return GroupScales(tuple(p[index] for p in self.planes), row_scale, self.bits, self.groups)

    @classmethod
    def read(cls, stored: Stored, out: int, groups: int) -> GroupScales:
        """The scales that a code's meta and tensors describe."""
        bits = stored.integer("scale_bits", 4, 16)
        if 8 < bits < 16:
            raise CorruptError(f"scale_bits must be 16 or 4 to 8, not {bits}")
        if bits == 16:
            half = stored.tensor("scales", (out, groups), torch.float16)
            return cls((half,), None, 16, groups)
        row_scale = stored.tensor("row_scale", (out,), torch.float16)
        return cls(stored_planes(stored, "scales", bits, out, groups), row_scale, bits, groups)

    @staticmethod
    def size(out: int, groups: int, bits: int = 16) -> int:
        """Bytes of such scales, without making them."""
        return 2 * out * groups if bits == 16 else packed_nbytes(out, groups, bits) + 2 * out


def quantize_scales(scales: Tensor, scale_bits: int = 16, *, check: bool = True) -> GroupScales:
    """Round `scales` (float [out, groups], >= 0 unless scale_bits is 16) to their stored form.

    A method rounds its scales first and chooses integers against `scales_as()` afterwards.
    A positive scale never rounds to zero. check: `scales` might be negative; to see that none is,
    a GPU is waited for.
    """
    scales = scales.detach().float()
    if scale_bits == 16:
        return GroupScales((_half(scales),), None, 16, scales.shape[1])
    if not 4 <= scale_bits <= 8:
        raise PliantError(f"scale_bits must be 16 or 4 to 8, not {scale_bits}")
    if check and bool((scales < 0).any()):
        raise PliantError("negative scales need scale_bits=16")
    top = 2**scale_bits - 1
    row_scale = _half(scales.amax(1) * (2**scale_bits / top))
    unit = row_scale.float()[:, None] * 2.0**-scale_bits
    integers = torch.where(unit > 0, scales / unit.clamp(min=1e-20), 0).round().clamp(0, top)
    integers = torch.where((scales > 0) & (unit > 0), integers.clamp(min=1), integers)
    planes = pack(integers.to(torch.uint8), scale_bits)
    return GroupScales(planes, row_scale, scale_bits, scales.shape[1])


def _half(values: Tensor) -> Tensor:
    """fp16 without overflow to infinity or underflow of a nonzero value to zero."""
    values = values.clamp(-_HALF_MAX, _HALF_MAX)
    half = values.half()
    tiny = torch.copysign(torch.full_like(half, 2.0**-24), half)
    return torch.where((half == 0) & (values != 0), tiny, half)


def plane_names(stem: str, bits: int) -> list[str]:
    """What the bit planes of integers of `bits` bits are called on disk."""
    return [f"{stem}.{width}" for width in PLANES[bits]]


def stored_planes(
    stored: Stored, stem: str, bits: int, out: int, columns: int
) -> tuple[Tensor, ...]:
    """The bit planes of [out, columns] integers, checked."""
    return tuple(
        stored.tensor(name, (out, plane_bytes(columns, plane)), torch.uint8)
        for name, plane in zip(plane_names(stem, bits), PLANES[bits], strict=True)
    )


@form("group_int")
@dataclass(frozen=True, eq=False)
class GroupInt(Code):
    """w = (q - zero) * scale, q of `bits` bits, a scale for each `group_size` inputs.

    The last group is as short as the width makes it. Without stored zeros the zero point is
    2**(bits-1), and 1/2 at one bit so that the levels are -scale/2 and +scale/2.
    """

    planes: tuple[Tensor, ...]  # bit planes, uint8 [out, bytes]
    stored_scales: GroupScales
    zeros: tuple[Tensor, ...] | None  # bit planes of [out, groups], or None: symmetric
    width: int
    bit_width: int
    group_size: int

    @classmethod
    def pack(
        cls,
        q: Tensor,  # [out, in] integers in 0 .. 2**bits - 1
        scales: Tensor | GroupScales,  # [out, groups]
        zeros: Tensor | None,  # [out, groups] integers in 0 .. 2**bits - 1
        bits: int,
        group_size: int,
        scale_bits: int = 16,
        *,
        check: bool = True,
    ) -> GroupInt:
        """Store integers; `group_size` <= 0 or beyond the width means one group a row.

        check: integers might be out of range; to see that none is, a GPU is waited for.
        """
        out, width = q.shape
        if bits not in PLANES:
            raise PliantError(f"bits must be 1 to 8, not {bits}")
        group_size = clip_group(group_size, width)
        stored = scales if isinstance(scales, GroupScales) else quantize_scales(scales, scale_bits)
        groups = -(-width // group_size)
        if stored.groups != groups or stored.planes[0].shape[0] != out:
            raise PliantError(f"expected scales [{out}, {groups}] for groups of {group_size}")
        if zeros is not None and tuple(zeros.shape) != (out, groups):
            raise PliantError(f"expected zeros [{out}, {groups}], not {tuple(zeros.shape)}")
        for what, values in (("q", q), ("zeros", zeros)):
            if values is not None and check:
                check_range(what, values, 2**bits)
        packed_zeros = None if zeros is None else pack(zeros, bits)
        return cls(pack(q, bits), stored, packed_zeros, width, bits, group_size)

    @staticmethod
    def size(
        out: int, width: int, bits: int, group_size: int, *, zeros: bool, scale_bits: int = 16
    ) -> int:
        """`nbytes` of such a code, without making it."""
        groups = -(-width // clip_group(group_size, width))
        scales = GroupScales.size(out, groups, scale_bits)
        packed_zeros = packed_nbytes(out, groups, bits) if zeros else 0
        return packed_nbytes(out, width, bits) + scales + packed_zeros

    @property
    def shape(self) -> tuple[int, int]:
        return self.planes[0].shape[0], self.width

    @property
    def groups(self) -> int:
        return -(-self.width // self.group_size)

    def integers(self) -> Tensor:
        """q, uint8 [out, in]."""
        return unpack(self.planes, self.bit_width, self.width).clone()

    def scales_as(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The scales, [out, groups]."""
        return self.stored_scales.scales_as(dtype)

    def zeros_as(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The zero points, [out, groups], the symmetric ones written out."""
        if self.zeros is not None:
            return unpack(self.zeros, self.bit_width, self.groups).to(dtype)
        symmetric = 0.5 if self.bit_width == 1 else float(2 ** (self.bit_width - 1))
        out = self.shape[0]
        return torch.full((out, self.groups), symmetric, dtype=dtype, device=self.device)

    def rows(self, index: slice | Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        count = row_count(index, self.shape[0])
        decoded = torch.empty(count, self.width, dtype=dtype, device=self.device)
        return self.rows_into(decoded, index)

    def rows_into(self, decoded: Tensor, index: slice | Tensor) -> Tensor:
        """`rows` written to memory that the caller has, [n, in] of any float dtype."""
        with one_thread():
            self._write_rows(decoded, index)
        return decoded

    def _write_rows(self, decoded: Tensor, index: slice | Tensor) -> None:
        planes = tuple(plane[index] for plane in self.planes)
        scales = self.stored_scales.rows(index).scales_as()
        zeros: Tensor | float = 0.5 if self.bit_width == 1 else 2.0 ** (self.bit_width - 1)
        if self.zeros is not None:
            picked = tuple(plane[index] for plane in self.zeros)
            zeros = unpack(picked, self.bit_width, self.groups).float()
        for tile in row_tiles(decoded.shape[0], self.width, self.device, _TILE):
            q = unpack([plane[tile] for plane in planes], self.bit_width, self.width)
            target = decoded[tile]
            values = target if decoded.dtype == torch.float32 else torch.empty_like(target).float()
            values.copy_(q)
            zero = zeros if isinstance(zeros, float) else zeros[tile]
            dequantize(values, scales[tile], zero, self.group_size)
            if values is not target:
                target.copy_(values)

    def tensors(self) -> dict[str, Tensor]:
        names = plane_names("q", self.bit_width)
        stored = dict(zip(names, self.planes, strict=True)) | self.stored_scales.tensors()
        if self.zeros is not None:
            names = plane_names("zeros", self.bit_width)
            stored |= dict(zip(names, self.zeros, strict=True))
        return stored

    def meta(self) -> dict[str, Any]:
        return {
            "code": self.name,
            "shape": list(self.shape),
            "bits": self.bit_width,
            "group_size": self.group_size,
            "scale_bits": self.stored_scales.bits,
            "zeros": self.zeros is not None,
        }

    @classmethod
    def build(cls, stored: Stored) -> GroupInt:
        out, width = stored.shape()
        bits = stored.integer("bits", 1, 8)
        group_size = stored.integer("group_size", 1, max(width, 1))
        groups = -(-width // group_size)
        scales = GroupScales.read(stored, out, groups)
        zeros = stored_planes(stored, "zeros", bits, out, groups) if stored.flag("zeros") else None
        planes = stored_planes(stored, "q", bits, out, width)
        return cls(planes, scales, zeros, width, bits, group_size)


def check_range(what: str, values: Tensor, bound: int) -> None:
    """Raise PliantError unless all of `values` are in 0 .. bound - 1."""
    if values.numel():
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= bound:
            raise PliantError(f"{what} must be in 0..{bound - 1}, not {low}..{high}")


def clip_group(group_size: int, width: int) -> int:
    """The group size as stored: a whole row for 0 or more than the width."""
    return width or 1 if group_size <= 0 else max(1, min(group_size, width))


def dequantize(values: Tensor, scales: Tensor, zeros: Tensor | float, group_size: int) -> None:
    """values <- (values - zero) * scale in place, group by group, the ragged group last."""
    width = values.shape[1]
    whole = width // group_size
    if isinstance(zeros, float):
        values.sub_(zeros)
    if whole:
        body = values[:, : whole * group_size].view(-1, whole, group_size)
        if not isinstance(zeros, float):
            body.sub_(zeros[:, :whole, None])
        body.mul_(scales[:, :whole, None])
    if width % group_size:
        tail = values[:, whole * group_size :]
        if not isinstance(zeros, float):
            tail.sub_(zeros[:, whole:])
        tail.mul_(scales[:, whole:])
