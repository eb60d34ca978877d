"""Round to nearest: nothing is farther than half a step from what is stored."""

from __future__ import annotations

import pytest
import torch

from pliant.errors import PliantError
from pliant.methods.catalog import find
from pliant.methods.quantize.rtn import rtn
from pliant.observe.statistics import Statistics

torch.set_num_threads(1)
NOTHING = Statistics()


def noise(out: int = 40, width: int = 100) -> torch.Tensor:
    return torch.randn(out, width, generator=torch.Generator().manual_seed(0)) * 0.05


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("scale_bits", [4, 6, 16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_within_half_a_step_of_the_stored_scale(
    bits: int, scale_bits: int, symmetric: bool
) -> None:
    weight = noise()
    code = rtn(weight, NOTHING, bits=bits, group_size=32, symmetric=symmetric,
               scale_bits=scale_bits)  # fmt: skip
    member = torch.arange(100) // 32
    scale, zero = code.scales_as()[:, member], code.zeros_as()[:, member]
    low, high = (0 - zero) * scale, (2**bits - 1 - zero) * scale
    nearest = weight.clamp(low, high)
    assert float(((code.decode() - nearest).abs() / scale).max()) <= 0.5 + 1e-4


def test_more_bits_and_smaller_groups_err_less() -> None:
    weight = noise()
    errors = [float((rtn(weight, NOTHING, bits=b).decode() - weight).norm()) for b in range(1, 9)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01 * float(weight.norm())
    sizes = [float((rtn(weight, NOTHING, bits=3, group_size=g).decode() - weight).norm())
             for g in (8, 16, 32, 0)]  # fmt: skip
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("width", [1, 3, 63, 65, 129])
@pytest.mark.parametrize("group_size", [0, 16, 64, 1000])
def test_any_width(width: int, group_size: int) -> None:
    weight = noise(5, width)
    code = rtn(weight, NOTHING, bits=8, group_size=group_size)
    assert code.shape == (5, width)
    assert float((code.decode() - weight).abs().max()) < 0.01 * float(weight.abs().max()) + 1e-6


def test_one_symmetric_bit_is_the_sign() -> None:
    weight = noise()
    code = rtn(weight, NOTHING, bits=1, group_size=20, symmetric=True)
    decoded = code.decode()
    assert torch.equal(decoded.sign(), torch.where(weight >= 0, 1.0, -1.0))
    grouped = decoded.abs().view(40, -1, 20)
    assert torch.equal(grouped, grouped[..., :1].expand_as(grouped)), "one magnitude a group"


def test_rows_in_tiles_are_rows_alone() -> None:
    weight = noise(1100, 1000)  # more than one tile
    whole = rtn(weight, NOTHING, bits=3).decode()
    for row in (0, 1047, 1048, 1099):
        assert torch.equal(rtn(weight[row : row + 1], NOTHING, bits=3).decode()[0], whole[row])


def test_inputs_that_matter_pull_the_range() -> None:
    weight = noise(64, 64)
    weight[:, 0] = 0.5
    moment = torch.eye(64)
    moment[0, 0] = 1e-6
    seen = rtn(weight, Statistics(second_moment=moment), bits=3).decode()
    blind = rtn(weight, NOTHING, bits=3).decode()
    rest = slice(1, None)
    assert (seen - weight)[:, rest].norm() < (blind - weight)[:, rest].norm()


def test_zero_and_constant_rows_are_finite() -> None:
    weight = noise()
    weight[0], weight[1], weight[2] = 0.0, 0.25, -1e-7
    for bits in (1, 2, 4):
        decoded = rtn(weight, NOTHING, bits=bits, group_size=32, scale_bits=6).decode()
        assert bool(torch.isfinite(decoded).all())
        assert float(decoded[0].abs().max()) < 1e-5
        assert torch.allclose(decoded[1], weight[1], rtol=0.05)


@pytest.mark.parametrize("bits", [0, 9])
def test_bits_out_of_range(bits: int) -> None:
    with pytest.raises(PliantError, match="1 to 8"):
        rtn(noise(), NOTHING, bits=bits)


def test_it_needs_no_text() -> None:
    assert find("rtn").needs == ()
