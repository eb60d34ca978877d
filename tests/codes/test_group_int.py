"""Group integers: the formula, the byte count, and scales that round before the integers do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pliant.codes import GroupInt, quantize_scales
from pliant.errors import PliantError
from tests.codes.forms import group_int, integers


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 8),
    st.integers(1, 11),
    st.integers(1, 200),
    st.integers(-1, 210),
    st.sampled_from([16, 4, 5, 6, 7, 8]),
    st.booleans(),
)
def test_decode_and_nbytes_follow_the_formula(
    bits: int, out: int, width: int, group: int, scale_bits: int, zeros: bool
) -> None:
    size = min(group, width) if group > 0 else width
    groups = -(-width // size)
    q, scales = integers(2**bits, out, width), torch.rand(out, groups) + 0.01
    zero = integers(2**bits, out, groups) if zeros else None
    code = GroupInt.pack(q, scales, zero, bits, group, scale_bits)
    assert torch.equal(code.integers(), q)

    member = torch.arange(width) // size
    by_hand = (q.float() - code.zeros_as()[:, member]) * code.scales_as()[:, member]
    assert torch.equal(code.decode(), by_hand)
    if zeros:
        assert torch.equal(code.zeros_as().to(torch.uint8), zero)

    expected = GroupInt.size(out, width, bits, group, zeros=zeros, scale_bits=scale_bits)
    assert code.nbytes == expected
    if bits in (1, 2, 4, 8) and scale_bits == 16:
        zero_bytes = -(-groups * bits // 8) if zeros else 0
        assert code.nbytes == out * (-(-width * bits // 8) + 2 * groups + zero_bytes)


def test_rounding_scales_first_gives_the_scales_that_decoding_uses() -> None:
    scales = (torch.rand(7, 13) * 0.9 + 0.1) * 1e-3
    for scale_bits in (16, 8, 6, 4):
        stored = quantize_scales(scales, scale_bits)
        code = GroupInt.pack(integers(16, 7, 130), stored, None, 4, 10)
        assert torch.equal(code.scales_as(), stored.scales_as())
        assert code.meta()["scale_bits"] == scale_bits
        error = (stored.scales_as() - scales).abs().amax(1) / scales.amax(1)
        assert float(error.max()) <= (2**-10 if scale_bits == 16 else 0.51 / (2**scale_bits - 1))


def test_positive_scales_stay_positive_and_finite() -> None:
    scales = torch.tensor([[1e-12, 1.0], [1e9, 3.0], [0.0, 0.0], [1e-9, 1e-9]])
    for scale_bits in (16, 8, 4):
        rounded = quantize_scales(scales, scale_bits).scales_as()
        assert bool(torch.isfinite(rounded).all())
        assert torch.equal(rounded > 0, scales > 0)


def test_one_bit_has_two_opposite_levels() -> None:
    code = GroupInt.pack(integers(2, 4, 16), torch.full((4, 1), 2.0), None, 1, 16)
    assert set(code.decode().unique().tolist()) == {-1.0, 1.0}


def test_smaller_groups_cost_only_their_scales() -> None:
    one, two = group_int(8, 128, group=128, zeros=False), group_int(8, 128, group=64, zeros=False)
    assert two.nbytes - one.nbytes == 8 * 2


@pytest.mark.parametrize("value", [-1, 16, 200])
def test_integers_out_of_range_are_told(value: int) -> None:
    q = torch.zeros(2, 8, dtype=torch.int32)
    q[1, 3] = value
    with pytest.raises(PliantError, match="q must be"):
        GroupInt.pack(q, torch.ones(2, 1), None, 4, 8)


def test_wrong_scales_are_told() -> None:
    with pytest.raises(PliantError, match="scales"):
        GroupInt.pack(integers(16, 2, 8), torch.ones(2, 3), None, 4, 4)
    with pytest.raises(PliantError, match="bits"):
        GroupInt.pack(integers(16, 2, 8), torch.ones(2, 1), None, 9, 8)
    with pytest.raises(PliantError, match="scale_bits"):
        quantize_scales(torch.ones(2, 2), 3)
