"""Stored rotations: exact although the blocks are rounded, shared or one a block, any width."""

from __future__ import annotations

import pytest
import torch

from pliant.codes import BlockRotated, Dense, from_tensors
from pliant.codes.block_rotated import turn
from pliant.errors import CorruptError, PliantError
from pliant.kernels import matmul
from tests.codes.forms import orthogonal


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("width", "size"), [(64, 16), (576, 64), (70, 16), (9, 16), (33, 32)])
def test_a_turned_weight_decodes_and_multiplies_as_itself(
    width: int, size: int, shared: bool
) -> None:
    torch.manual_seed(0)
    size = min(size, width)
    weight, x = torch.randn(5, width), torch.randn(3, width)
    count = 1 if shared else width // size
    blocks = torch.stack([orthogonal(size) for _ in range(count)])
    tail = orthogonal(width % size)
    code = BlockRotated.by(Dense(turn(weight, blocks, tail)), blocks, tail)
    torch.testing.assert_close(code.decode(), weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(matmul(x, code), x @ weight.t(), rtol=1e-5, atol=2e-5)
    assert code.nbytes == weight.nbytes + 2 * count * size**2 + 2 * (width % size) ** 2


def test_blocks_that_do_not_fit_are_told() -> None:
    inner = Dense(torch.randn(3, 40))
    with pytest.raises(PliantError, match="up to 64"):
        BlockRotated.by(inner, torch.zeros(1, 65, 65))
    with pytest.raises(PliantError, match="40 inputs"):
        BlockRotated.by(inner, torch.zeros(2, 16, 16))  # lacks the tail of 8
    with pytest.raises(PliantError, match="40 inputs"):
        BlockRotated.by(inner, torch.zeros(3, 8, 8))
    code = BlockRotated.by(inner, torch.zeros(5, 8, 8))
    with pytest.raises(CorruptError, match="block"):
        from_tensors({**code.meta(), "block": 65}, code.tensors())
    with pytest.raises(CorruptError, match="blocks"):
        from_tensors({**code.meta(), "shared": True}, code.tensors())
