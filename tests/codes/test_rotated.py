"""Rotations: orthonormal at any width, and they spread outliers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pliant.codes import Dense, Rotated
from pliant.codes.rotated import blocks


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 700), st.integers(0, 2**32 - 1))
def test_orthonormal_and_inverted(width: int, seed: int) -> None:
    assert sum(blocks(width)) == width
    q = Rotated.rotate(torch.eye(width), seed)
    torch.testing.assert_close(q @ q.T, torch.eye(width), rtol=0, atol=1e-5)
    torch.testing.assert_close(Rotated.unrotate(q, seed), torch.eye(width), rtol=0, atol=1e-5)


@pytest.mark.parametrize("width", [64, 576, 1000, 2048, 4097])
def test_a_rotated_weight_decodes_to_itself(width: int) -> None:
    weight = torch.randn(3, width)
    code = Rotated(Dense(Rotated.rotate(weight, 5)), 5)
    torch.testing.assert_close(code.decode(), weight, rtol=1e-5, atol=1e-5)
    assert code.nbytes == weight.nbytes


def test_an_outlier_is_spread_over_its_block() -> None:
    x = torch.zeros(576)
    x[3] = 100.0
    assert Rotated.rotate(x, 0).abs().max() == pytest.approx(100 / 512**0.5, rel=1e-4)


def test_signs_never_change_between_versions() -> None:
    signs = [-1, 1, -1, -1, -1, 1]  # widths 1, 3, ...: the last input is a block of its own
    ones = [Rotated.rotate(torch.eye(width)[-1], 7)[-1].item() for width in range(1, 12, 2)]
    assert ones == signs
