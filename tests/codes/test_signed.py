"""Signed: one bit a weight beside its magnitudes."""

from __future__ import annotations

import pytest
import torch

from pliant.codes import Dense, LowRank, Signed
from pliant.errors import PliantError


def test_signs_and_magnitudes_restore_the_matrix() -> None:
    weight = torch.randn(7, 21)
    code = Signed.of(weight > 0, Dense(weight.abs()))
    assert torch.equal(code.decode(), weight)


def test_bytes_are_the_signs_and_the_inner_codes() -> None:
    weight = torch.randn(7, 21)
    inner = LowRank.from_factors(torch.rand(7, 2), torch.rand(2, 21))
    assert Signed.of(weight > 0, inner).nbytes == 7 * 3 + inner.nbytes == 21 + 2 * 2 * 28


def test_signs_that_do_not_fit_are_told() -> None:
    with pytest.raises(PliantError, match="signs"):
        Signed(torch.zeros(7, 2, dtype=torch.uint8), Dense(torch.zeros(7, 21)))
