"""Ternary: five trits a byte, and not a byte more than a row needs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pliant.codes import Ternary, from_tensors
from pliant.errors import CorruptError, PliantError


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 9), st.integers(1, 300), st.integers(0, 99), st.sampled_from([16, 4, 6, 8]))
def test_round_trip_of_any_width(rows: int, width: int, seed: int, scale_bits: int) -> None:
    torch.manual_seed(seed)
    group = int(torch.randint(1, width + 1, ()))
    trits = torch.randint(0, 3, (rows, width), dtype=torch.uint8)
    scales = torch.rand(rows, -(-width // group)) + 0.01
    code = Ternary.pack(trits, scales, group, scale_bits)
    assert torch.equal(code.trits(), trits)
    assert code.nbytes == Ternary.size(rows, width, group, scale_bits=scale_bits)
    assert code.packed.nbytes == rows * -(-width // 5)
    expanded = code.stored_scales.scales_as()[:, torch.arange(width) // group]
    assert torch.equal(code.decode(), (trits.float() - 1) * expanded)


def test_a_row_of_a_real_width_takes_1_6_bits_and_its_scales() -> None:
    code = Ternary.pack(torch.ones(10, 576, dtype=torch.uint8), torch.ones(10, 9), 64)
    assert code.nbytes == 10 * (116 + 18)
    assert not code.decode().any()


def test_neighbours_share_a_byte() -> None:
    code = Ternary.pack(torch.tensor([[2, 0, 1, 0, 2, 2]]), torch.ones(1, 1))
    assert code.packed.tolist() == [[2 + 9 + 2 * 81, 2 + 3 + 9 + 27 + 81]]


def test_what_is_no_trit_is_told() -> None:
    with pytest.raises(PliantError, match=r"0\.\.2"):
        Ternary.pack(torch.full((2, 5), 3), torch.ones(2, 1))
    with pytest.raises(PliantError, match="scales"):
        Ternary.pack(torch.ones(2, 5), torch.ones(2, 2))
    code = Ternary.pack(torch.ones(2, 5), torch.ones(2, 1))
    bad = code.tensors() | {"trits": torch.full((2, 1), 243, dtype=torch.uint8)}
    with pytest.raises(CorruptError, match="trits"):
        from_tensors(code.meta(), bad)
