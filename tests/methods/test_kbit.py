"""kbit: data types are what they say, blocks are scaled by their largest, smaller blocks help."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pliant.errors import PliantError
from pliant.methods.numerics import weighted_error
from pliant.methods.quantize.kbit import DATA_TYPES, dynamic_levels, kbit, kbit_gptq
from pliant.observe.statistics import Statistics
from tests.methods.problems import problem

torch.set_num_threads(1)


def heavy(out: int = 64, width: int = 256) -> Tensor:
    torch.manual_seed(0)
    return torch.distributions.StudentT(5.0).sample((out, width)) * 0.02


def loss(weight: Tensor, **options: object) -> float:
    return float((kbit(weight, Statistics(), **options).decode() - weight).square().sum())


def test_dynamic_levels_are_read_off_the_bits() -> None:
    found = []
    for pattern in range(2**5):
        sign, rest = pattern >> 4, format(pattern & 15, "04b")
        zeros = len(rest) - len(rest.lstrip("0"))
        fraction = rest[zeros + 1 :]
        if zeros == 4:
            found.append(1.0 if sign else 0.0)
            continue
        step = 0.9 / 2 ** len(fraction)
        middle = 0.1 + step * (int(fraction or "0", 2) + 0.5)
        found.append((-1) ** sign * 10.0**-zeros * middle)
    torch.testing.assert_close(dynamic_levels(5), torch.tensor(sorted(found)))
    assert all(len(set(dynamic_levels(bits).tolist())) == 2**bits for bits in range(2, 9))


@pytest.mark.parametrize("data_type", ["int", "float"])
@pytest.mark.parametrize("bits", [3, 4, 6])
def test_the_largest_weight_of_a_block_is_kept(data_type: str, bits: int) -> None:
    weight = heavy()
    code = kbit(weight, Statistics(), bits=bits, data_type=data_type, group_size=64)
    blocks, decoded = weight.view(64, 4, 64), code.decode().view(64, 4, 64)
    largest = blocks.abs().argmax(-1, keepdim=True)
    torch.testing.assert_close(
        decoded.gather(-1, largest), blocks.gather(-1, largest), rtol=1e-3, atol=0
    )


def test_quantile_levels_are_used_equally_often() -> None:
    code = kbit(heavy(), Statistics(), bits=3, data_type="quantile", group_size=0)
    levels = code.tables[0].float()
    assert float(levels.abs().max()) == 1.0
    # Between levels i and i + 1 lie as many weights as between their neighbours.
    scaled = heavy() / code.scales_as()
    counts = torch.histogram(scaled.flatten().sort().values, levels[1:-1]).hist
    assert float(counts.max() / counts.min()) < 2.5
    uniform = torch.histogram(scaled.flatten(), torch.linspace(-1, 1, 6)).hist
    assert float(uniform.max() / uniform.min()) > 20


@pytest.mark.parametrize("data_type", DATA_TYPES)
def test_small_blocks_and_more_bits_lower_the_error(data_type: str) -> None:
    weight = heavy()
    by_block = [loss(weight, data_type=data_type, group_size=size) for size in (0, 64, 16)]
    assert by_block[0] > by_block[1] > by_block[2]
    by_bits = [loss(weight, data_type=data_type, bits=bits) for bits in (3, 4, 5, 6)]
    assert by_bits == sorted(by_bits, reverse=True)


@pytest.mark.parametrize("bits", range(3, 9))
def test_two_exponent_bits_are_best_for_weights(bits: int) -> None:
    losses = [loss(heavy(), bits=bits, exponent=e) for e in (2, 3, 4) if e < bits]
    assert losses[0] == min(losses)


def test_floats_beat_integers_on_heavy_tails() -> None:
    weight = heavy()
    assert loss(weight, data_type="float") < 0.8 * loss(weight, data_type="int")
    uniform = torch.rand(64, 256) - 0.5
    assert loss(uniform, data_type="float") > loss(uniform, data_type="int")


@pytest.mark.parametrize("data_type", DATA_TYPES)
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_bit_width_and_ragged_blocks(data_type: str, bits: int) -> None:
    weight = heavy(out=5, width=70)
    code = kbit(weight, Statistics(), bits=bits, data_type=data_type, group_size=32)
    planes = {2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}[bits]
    assert code.nbytes == 5 * (sum(-(-70 * p // 8) for p in planes) + 2 * 3) + 2 * 2**bits
    zeros = kbit(torch.zeros(3, 8), Statistics(), bits=bits, data_type=data_type).decode()
    assert float(zeros.abs().max()) < 1e-6


@pytest.mark.parametrize("data_type", DATA_TYPES)
def test_feedback_lowers_the_error_at_the_outputs(data_type: str) -> None:
    weight, statistics = problem()
    assert statistics.second_moment is not None
    options = {"bits": 3, "data_type": data_type, "group_size": 32}
    codes = kbit(weight, statistics, **options), kbit_gptq(weight, statistics, **options)
    plain, fed = (weighted_error(c.decode() - weight, statistics.second_moment) for c in codes)
    assert fed < 0.8 * plain


def test_what_it_does_not_know_is_told() -> None:
    too_wide = {"bits": 8, "exponent": 6}
    for options in ({"bits": 1}, {"bits": 9}, {"data_type": "posit"}, {"exponent": 4}, too_wide):
        with pytest.raises(PliantError):
            kbit(torch.eye(4), Statistics(), **options)
