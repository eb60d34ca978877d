"""Codes of random numbers, laid out as stored ones are, to time products with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pliant.codes import Code, Dense, GroupInt, GroupLevels, GroupScales, LowRank, Sum
from pliant.codes.packing import PLANES, plane_bytes
from pliant.methods.levels import byte_tables

Sample = Callable[[int, int], Code]

GROUP = 64
RANK = 32


def group_int(out: int, width: int, bits: int = 4, zeros: bool = True) -> GroupInt:
    """Groups of 64 with scales of 16 bits and, unless told otherwise, zero points."""
    group = min(GROUP, width)
    groups = -(-width // group)
    return GroupInt(
        _planes(out, width, bits), GroupScales((_scales(out, groups),), None, 16, groups),
        _planes(out, groups, bits) if zeros else None, width, bits, group,
    )  # fmt: skip


def group_levels(out: int, width: int, bits: int) -> GroupLevels:
    """Groups of 64 with scales of 6 bits, each group one of four tables of 8-bit levels."""
    group = min(GROUP, width)
    groups = -(-width // group)
    scales = GroupScales(_planes(out, groups, 6), _scales(out, 1)[:, 0], 6, groups)
    tables = byte_tables(torch.randn(4, 2**bits).sort(1).values).half()
    return GroupLevels(
        _planes(out, width, bits), scales, tables, _planes(out, groups, 2), width, bits, group
    )


def dense(out: int, width: int) -> Dense:
    return Dense((torch.randn(out, width) / width**0.5).bfloat16())


def with_low_rank(out: int, width: int) -> Sum:
    """4 bits and a correction of rank 32."""
    factors = torch.randn(out, RANK) / RANK, torch.randn(RANK, width) / width**0.5
    return Sum((group_int(out, width), LowRank.from_factors(*factors)))


def _integers(bits: int) -> Sample:
    return lambda out, width: group_int(out, width, bits)


def _levels(bits: int) -> Sample:
    return lambda out, width: group_levels(out, width, bits)


COMMON: dict[str, Sample] = {
    **{f"int{bits}": _integers(bits) for bits in (2, 3, 4, 5, 6, 8)},
    **{f"levels{bits}": _levels(bits) for bits in (2, 3, 4)},
    f"int4 + rank {RANK}": with_low_rank,
    "bf16": dense,
}
"""By name: group integers, learned levels, a sum with a low-rank term, and no compression."""


def _planes(out: int, columns: int, bits: int) -> tuple[Tensor, ...]:
    return tuple(
        torch.randint(0, 256, (out, plane_bytes(columns, wide)), dtype=torch.uint8)
        for wide in PLANES[bits]
    )


def _scales(out: int, groups: int) -> Tensor:
    return (0.001 * (1 + torch.rand(out, groups))).half()
