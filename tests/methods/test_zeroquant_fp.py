"""ZeroQuant-FP: with constrained scales a cast to FP8 changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pliant.codes import LowRank, PowerScales, Sum
from pliant.errors import PliantError
from pliant.methods import find
from pliant.methods.numerics import weighted_error
from pliant.methods.quantize.zeroquant_fp import zeroquant_fp, zeroquant_fp_rtn
from pliant.observe.statistics import Statistics
from tests.methods.problems import problem

torch.set_num_threads(1)


def lopsided() -> tuple[Tensor, Statistics]:
    """Rows and groups of very different size."""
    weight, statistics = problem(width=130)
    weight = weight * torch.logspace(-1, 1, 48)[:, None]
    weight[:, 40:70] *= 0.03
    return weight, statistics


def survives(values: Tensor) -> bool:
    """Whether e4m3 holds `values` exactly."""
    return torch.equal(values.to(torch.float8_e4m3fn).float(), values)


@pytest.mark.parametrize("method", [zeroquant_fp, zeroquant_fp_rtn])
def test_a_cast_to_fp8_is_exact(method) -> None:
    weight, statistics = lopsided()
    ratio = method(weight, statistics, constraint="ratio")
    assert isinstance(ratio.stored_scales, PowerScales)
    factor = ratio.stored_scales.row_scale
    assert factor is not None
    # Row by row: the largest becomes 6 times a power of two below e4m3's largest, 448.
    values = ratio.decode() / factor.float()[:, None]
    assert survives(values * 2.0)
    assert survives(values / 8.0 * 16.0)

    power = method(weight, statistics, constraint="power")
    largest = power.scales_as().max()
    assert survives(power.decode() / largest)

    free = method(weight, statistics, constraint="none")
    assert not survives(free.decode() / free.scales_as()[:, :1])


def test_constraints_take_fewer_bytes_and_cost_error() -> None:
    weight, statistics = lopsided()
    assert statistics.second_moment is not None
    codes = [zeroquant_fp_rtn(weight, statistics, constraint=c) for c in ("none", "ratio", "power")]
    sizes = [code.nbytes for code in codes]
    groups = 3
    indices = 48 * 65 + 2 * 16
    assert sizes[0] == indices + 48 * 2 * groups
    assert sizes[2] == indices + 48 * 2, "a two-bit and a one-bit plane, a byte a row each"
    assert sizes[1] == sizes[2] + 2 * 48
    importance = statistics.second_moment.diagonal()
    errors = [float(((c.decode() - weight).square() * importance).sum()) for c in codes]
    assert errors[0] < errors[1]
    ratio = weighted_error(codes[1].decode() - weight, statistics.second_moment)
    free = weighted_error(codes[0].decode() - weight, statistics.second_moment)
    assert ratio < 2.5 * free


@pytest.mark.parametrize("constraint", ["none", "power", "ratio"])
def test_feedback_lowers_the_error_at_the_outputs(constraint: str) -> None:
    weight, statistics = problem()
    assert statistics.second_moment is not None
    codes = [f(weight, statistics, constraint=constraint) for f in (zeroquant_fp_rtn, zeroquant_fp)]
    assert codes[0].nbytes == codes[1].nbytes
    plain, fed = (weighted_error(c.decode() - weight, statistics.second_moment) for c in codes)
    assert fed < 0.8 * plain


def test_low_rank_compensation_composes() -> None:
    weight, statistics = problem()
    code = find("lorc").function(
        weight, statistics, base="zeroquant_fp", rank=8, constraint="power"
    )
    assert isinstance(code, Sum)
    assert isinstance(code.parts[1], LowRank)
    base = zeroquant_fp(weight, statistics, constraint="power")
    assert torch.equal(code.parts[0].decode(), base.decode())
    assert (code.decode() - weight).norm() < 0.9 * (base.decode() - weight).norm()


def test_an_unknown_constraint_is_refused() -> None:
    with pytest.raises(PliantError, match="constraint"):
        zeroquant_fp_rtn(torch.eye(4), Statistics(), constraint="half")
