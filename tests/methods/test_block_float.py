"""block_float: integers times shared powers of two, bytes as the format counts, and no data."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pliant.errors import PliantError
from pliant.methods.grid import fit_grid
from pliant.methods.numerics import weighted_error
from pliant.methods.quantize.block_float import ELEMENTS, block_float, block_float_gptq
from pliant.observe.statistics import Statistics
from tests.methods.problems import problem

torch.set_num_threads(1)


def heavy(out: int = 32, width: int = 256) -> Tensor:
    torch.manual_seed(0)
    return torch.distributions.StudentT(4.0).sample((out, width)) * 0.02


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_block_is_integers_times_one_power_of_two(bits: int, clip: bool) -> None:
    weight = heavy()
    code = block_float(weight, Statistics(), bits=bits, clip=clip)
    scales = code.scales_as()
    assert bool((scales.frexp().mantissa == 0.5).all())
    integers = code.decode().view(32, 16, 16) / scales[..., None]
    top = 2 ** (bits - 1) - 1
    assert torch.equal(integers, integers.round())
    assert float(integers.abs().max()) <= top
    if not clip:  # within half a step, and a step no coarser than the largest weight asks for
        assert bool(
            ((code.decode() - weight).abs().view(32, 16, 16) <= scales[..., None] / 2).all()
        )
        need = weight.view(32, 16, 16).abs().amax(-1) / top
        assert bool((scales < 2.001 * need).all())


@pytest.mark.parametrize(("bits", "block", "shared"), [(4, 16, 8), (6, 16, 5), (3, 32, 4)])
def test_bytes_are_mantissas_and_shared_exponents(bits: int, block: int, shared: int) -> None:
    weight = heavy(width=100)
    code = block_float(weight, Statistics(), bits=bits, block_size=block, shared_bits=shared)
    planes = {3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 8: [8]}
    row = sum(math.ceil(100 * p / 8) for p in planes[bits])
    row += sum(math.ceil(math.ceil(100 / block) * p / 8) for p in planes[shared])
    assert code.nbytes == 32 * row + 2 * 2**bits


@pytest.mark.parametrize("element", ELEMENTS)
def test_no_data_is_used(element: str) -> None:
    weight, statistics = problem()
    blind = block_float(weight, Statistics(), element=element)
    assert torch.equal(block_float(weight, statistics, element=element).decode(), blind.decode())


def test_six_bits_in_blocks_lose_far_less_than_integers_of_a_row() -> None:
    weight = heavy()
    weight[:, 7] *= 20  # an outlier channel, which coarsens the whole row
    code = block_float(weight, Statistics(), bits=6)
    grid = fit_grid(weight, 6, 0, symmetric=True)
    rows = ((weight / grid.scales + grid.zeros).round().clamp(0, 63) - grid.zeros) * grid.scales
    error = [
        float((d - weight).square().sum() / weight.square().sum()) for d in (code.decode(), rows)
    ]
    assert error[0] < 3e-3
    assert error[0] < 0.2 * error[1]


def test_elements_of_their_own_exponent_help_few_bits_and_large_blocks() -> None:
    weight = heavy()
    for bits in (3, 4):
        loss = [
            float((block_float(weight, Statistics(), bits=bits, block_size=64, element=e).decode()
                   - weight).square().sum())
            for e in ("mantissa", "minifloat")
        ]  # fmt: skip
        assert loss[1] < 0.9 * loss[0]
    logarithms = block_float(weight, Statistics(), element="log").decode().abs()
    mantissa = logarithms[logarithms > 0].frexp().mantissa
    assert bool((mantissa == 0.5).all())


@pytest.mark.parametrize("element", ELEMENTS)
def test_feedback_lowers_the_error_at_the_outputs(element: str) -> None:
    weight, statistics = problem()
    assert statistics.second_moment is not None
    codes = [
        f(weight, statistics, bits=3, element=element) for f in (block_float, block_float_gptq)
    ]
    assert codes[0].nbytes == codes[1].nbytes
    plain, fed = (weighted_error(c.decode() - weight, statistics.second_moment) for c in codes)
    assert fed < 0.8 * plain


def test_unknown_elements_are_refused() -> None:
    for options in ({"element": "posit"}, {"bits": 1}, {"bits": 8, "element": "log"}):
        with pytest.raises(PliantError):
            block_float(torch.eye(4), Statistics(), **options)
