"""Small integers in bytes: bit planes that unpack with a few contiguous vector operations.

A value of `bits` bits is cut into planes of 8, 4, 2 or 1 bits (3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2,
7 = 4 + 2 + 1); the first plane holds the lowest bits. Each row of a plane is padded to a whole
byte and no further. A plane is split by parts, not by neighbours: with n = ceil(width / per_byte)
bytes a row, byte j holds elements j, j + n, j + 2n, ..., so one shift yields n neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

PLANES = {
    1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,),
}  # fmt: skip


def plane_bytes(width: int, plane: int) -> int:
    """Bytes that one row of `width` values takes in a plane of `plane` bits."""
    return -(-width * plane // 8)


def packed_nbytes(rows: int, width: int, bits: int) -> int:
    """Bytes of `rows` packed rows of `width` values of `bits` bits."""
    return rows * sum(plane_bytes(width, plane) for plane in PLANES[bits])


def pack(values: Tensor, bits: int) -> tuple[Tensor, ...]:
    """Planes (uint8 [rows, plane_bytes]) of `values` (integers [rows, width] below 2**bits)."""
    rows, width = values.shape
    values = values.to(torch.uint8)
    planes = []
    shift = 0
    for plane in PLANES[bits]:
        size, count = plane_bytes(width, plane), 8 // plane
        part = (values >> shift).bitwise_and_((1 << plane) - 1)
        if size * count > width:
            part = pad(part, (0, size * count - width))
        if count > 1:  # what is added has no bit in common
            shifts = torch.arange(0, 8, plane, dtype=torch.uint8, device=values.device)[:, None]
            part = (part.view(rows, count, size) << shifts).sum(1, dtype=torch.uint8)
        planes.append(part)
        shift += plane
    return tuple(planes)


def unpack(planes: Sequence[Tensor], bits: int, width: int) -> Tensor:
    """The values (uint8 [rows, width]) that `pack` stored in `planes`."""
    values: Tensor | None = None
    shift = 0
    for packed, plane in zip(planes, PLANES[bits], strict=True):
        part = _unpack_plane(packed, plane)[:, :width]
        values = part if values is None else values.bitwise_or_(part.bitwise_left_shift_(shift))
        shift += plane
    assert values is not None
    return values


def _unpack_plane(packed: Tensor, plane: int) -> Tensor:
    """uint8 [rows, 8 / plane * bytes]: one broadcast shift and one mask."""
    if plane == 8:
        return packed
    shifts = torch.arange(0, 8, plane, dtype=torch.uint8, device=packed.device)[:, None]
    values = torch.bitwise_right_shift(packed[:, None, :], shifts)
    return values.bitwise_and_((1 << plane) - 1).flatten(1)
