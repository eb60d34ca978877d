"""Group levels: each weight is one of 2**bits shared levels times its group's scale."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pliant.codes.base import Code, Stored, form, one_thread, row_count, row_tiles
from pliant.codes.group_int import (
    GroupScales,
    check_range,
    clip_group,
    plane_names,
    stored_planes,
)
from pliant.codes.packing import PLANES, pack, unpack
from pliant.codes.power_scales import PowerScales
from pliant.errors import CorruptError, PliantError

_MOST_TABLES = 256
_TILE = 1 << 17  # elements decoded at once: 1 MiB of indices, so that calls cost little beside work


@form("group_levels")
@dataclass(frozen=True, eq=False)
class GroupLevels(Code):
    """w = tables[table, index] * scale; scale and table are those of the weight's group.

    Small floats, block floating point, quantiles and mixtures of data types are all this: one
    table for the matrix, or a few and a selector that names one for each group. The last group is
    as short as the width makes it.
    """

    planes: tuple[Tensor, ...]  # bit planes of the indices, uint8 [out, bytes]
    stored_scales: GroupScales | PowerScales
    tables: Tensor  # fp16 [tables, 2**bits]
    selector: tuple[Tensor, ...] | None  # bit planes of [out, groups], or None: one table
    width: int
    bit_width: int
    group_size: int

    @classmethod
    def pack(
        cls,
        index: Tensor,  # [out, in] integers in 0 .. 2**bits - 1
        scales: GroupScales | PowerScales,  # of [out, groups]
        tables: Tensor,  # [tables, 2**bits]
        selector: Tensor | None,  # [out, groups] integers below `tables`; None with one table
        bits: int,
        group_size: int,
        *,
        check: bool = True,
    ) -> GroupLevels:
        """Store indices; `group_size` <= 0 or beyond the width means one group a row.

        check: integers might be out of range; to see that none is, a GPU is waited for.
        """
        out, width = index.shape
        if bits not in PLANES:
            raise PliantError(f"bits must be 1 to 8, not {bits}")
        group_size = clip_group(group_size, width)
        groups = -(-width // group_size)
        count = tables.shape[0]
        if tables.shape != (count, 2**bits) or not 1 <= count <= _MOST_TABLES:
            raise PliantError(
                f"expected 1 to {_MOST_TABLES} tables of {2**bits} levels, not {list(tables.shape)}"
            )
        if scales.groups != groups or scales.planes[0].shape[0] != out:
            raise PliantError(f"expected scales [{out}, {groups}] for groups of {group_size}")
        if (selector is None) != (count == 1):
            raise PliantError("a selector goes with more than one table, and with those only")
        if selector is not None and tuple(selector.shape) != (out, groups):
            raise PliantError(f"expected a selector [{out}, {groups}], not {list(selector.shape)}")
        for what, values, bound in (("index", index, 2**bits), ("selector", selector, count)):
            if values is not None and check:
                check_range(what, values, bound)
        chosen = None if selector is None else pack(selector, _selector_bits(count))
        half = tables.clamp(-65504, 65504).half().contiguous()
        return cls(pack(index, bits), scales, half, chosen, width, bits, group_size)

    @property
    def shape(self) -> tuple[int, int]:
        return self.planes[0].shape[0], self.width

    @property
    def groups(self) -> int:
        return -(-self.width // self.group_size)

    def indices(self) -> Tensor:
        """uint8 [out, in]."""
        return unpack(self.planes, self.bit_width, self.width).clone()

    def scales_as(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The scales, [out, groups]."""
        return self.stored_scales.scales_as(dtype)

    def selected(self) -> Tensor:
        """The table of each group, uint8 [out, groups]."""
        if self.selector is None:
            out = self.shape[0]
            return torch.zeros(out, self.groups, dtype=torch.uint8, device=self.device)
        return unpack(self.selector, _selector_bits(len(self.tables)), self.groups).clone()

    def rows(self, index: slice | Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        count = row_count(index, self.shape[0])
        decoded = torch.empty(count, self.width, dtype=dtype, device=self.device)
        with one_thread():
            self._write_rows(decoded, index)
        return decoded

    def _write_rows(self, decoded: Tensor, index: slice | Tensor) -> None:
        planes = tuple(plane[index] for plane in self.planes)
        scales = self.stored_scales.rows(index).scales_as()
        levels = self.tables.float().flatten()
        offsets: Tensor | None = None
        if self.selector is not None:
            picked = tuple(plane[index] for plane in self.selector)
            offsets = unpack(picked, _selector_bits(len(self.tables)), self.groups).long()
            offsets = offsets << self.bit_width
        for tile in row_tiles(decoded.shape[0], self.width, self.device, _TILE):
            q = unpack([plane[tile] for plane in planes], self.bit_width, self.width)
            places = q.to(torch.int64)
            if offsets is not None:
                for part, offset in _in_groups(places, offsets[tile], self.group_size):
                    part.add_(offset)
            values = torch.index_select(levels, 0, places.view(-1)).view(places.shape)
            for part, scale in _in_groups(values, scales[tile], self.group_size):
                part.mul_(scale)
            decoded[tile] = values

    def tensors(self) -> dict[str, Tensor]:
        names = plane_names("index", self.bit_width)
        stored = dict(zip(names, self.planes, strict=True)) | self.stored_scales.tensors()
        stored["tables"] = self.tables
        if self.selector is not None:
            names = plane_names("selector", _selector_bits(len(self.tables)))
            stored |= dict(zip(names, self.selector, strict=True))
        return stored

    def meta(self) -> dict[str, Any]:
        scales = self.stored_scales
        meta: dict[str, Any] = {
            "code": self.name,
            "shape": list(self.shape),
            "bits": self.bit_width,
            "group_size": self.group_size,
            "tables": len(self.tables),
            "scale_bits": scales.bits,
            "powers": isinstance(scales, PowerScales),
        }
        if isinstance(scales, PowerScales):
            meta |= {"base": scales.base, "row_scale": scales.row_scale is not None}
        return meta

    @classmethod
    def build(cls, stored: Stored) -> GroupLevels:
        out, width = stored.shape()
        bits = stored.integer("bits", 1, 8)
        group_size = stored.integer("group_size", 1, max(width, 1))
        count = stored.integer("tables", 1, _MOST_TABLES)
        groups = -(-width // group_size)
        scales: GroupScales | PowerScales
        if stored.flag("powers"):
            scales = PowerScales.read(stored, out, groups)
        else:
            scales = GroupScales.read(stored, out, groups)
        tables = stored.tensor("tables", (count, 2**bits), torch.float16)
        planes = stored_planes(stored, "index", bits, out, width)
        if count == 1:
            return cls(planes, scales, tables, None, width, bits, group_size)
        wide = _selector_bits(count)
        selector = stored_planes(stored, "selector", wide, out, groups)
        code = cls(planes, scales, tables, selector, width, bits, group_size)
        if count != 2**wide and out * groups and int(code.selected().max()) >= count:
            raise CorruptError(f"selector names a table outside 0..{count - 1}")
        return code


def _selector_bits(tables: int) -> int:
    return (tables - 1).bit_length()


def _in_groups(values: Tensor, per_group: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of values [rows, in] beside what belongs to their groups, the ragged one last."""
    rows, width = values.shape
    whole = width // size
    if whole:
        yield values[:, : whole * size].view(rows, whole, size), per_group[:, :whole, None]
    if width % size:
        yield values[:, whole * size :], per_group[:, whole:]
