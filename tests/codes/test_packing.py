"""Bit planes: exact round trips, and not a byte more than a row needs."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pliant.codes.packing import PLANES, pack, packed_nbytes, unpack


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 8), st.integers(0, 9), st.integers(1, 300), st.integers(0, 99))
def test_round_trip(bits: int, rows: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 2**bits, (rows, width), dtype=torch.uint8, generator=generator)
    planes = pack(values, bits)
    assert torch.equal(unpack(planes, bits, width), values)
    assert sum(plane.nbytes for plane in planes) == packed_nbytes(rows, width, bits)
    assert packed_nbytes(rows, width, bits) < rows * (width * bits / 8 + len(PLANES[bits])) + 1


def test_planes_add_up_to_the_bits() -> None:
    assert all(sum(planes) == bits for bits, planes in PLANES.items())


def test_half_split_layout() -> None:
    (plane,) = pack(torch.tensor([[1, 2, 3, 4, 5]], dtype=torch.uint8), 4)
    assert plane.tolist() == [[1 | 4 << 4, 2 | 5 << 4, 3]]
