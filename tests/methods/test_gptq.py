"""GPTQ: less error at the outputs than rounding, whatever blocks and tiles it works in."""

from __future__ import annotations

import pytest
import torch

from pliant.codes import GroupInt
from pliant.errors import PliantError
from pliant.methods.numerics import weighted_error
from pliant.methods.quantize import gptq as module
from pliant.methods.quantize.gptq import begin_factor, gptq, inverse_factor, shared_factor
from pliant.methods.quantize.rtn import rtn
from pliant.observe.statistics import Statistics
from tests.methods.problems import correlated, problem

torch.set_num_threads(1)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_beats_rounding_at_the_outputs(bits: int, act_order: bool, symmetric: bool) -> None:
    weight, statistics = problem()
    moment = statistics.second_moment
    assert moment is not None
    options = {"bits": bits, "group_size": 32, "symmetric": symmetric}
    code = gptq(weight, statistics, act_order=act_order, damp=0.01, **options)
    plain = rtn(weight, statistics, **options)
    assert code.nbytes == plain.nbytes, "no permutation is stored"
    errors = [weighted_error(c.decode() - weight, moment) for c in (code, plain)]
    assert errors[0] < 0.8 * errors[1]
    assert (code.decode() - weight).norm() > (plain.decode() - weight).norm()


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("clip", [True, False])
def test_inputs_without_correlation_leave_rounding(act_order: bool, clip: bool) -> None:
    weight, _ = problem()
    diagonal = torch.rand(128, generator=torch.Generator().manual_seed(2)) + 0.1
    statistics = Statistics(tokens=1, second_moment=torch.diag(diagonal))
    code = gptq(weight, statistics, bits=3, act_order=act_order, clip=clip)
    plain = rtn(weight, statistics, bits=3, clip=clip)
    # q is rounded with 1/scale here and divided by scale there: ties may fall either way.
    differ = code.integers() != plain.integers()
    assert float(differ.float().mean()) < 1e-3
    assert torch.equal(code.scales_as(), plain.scales_as())
    assert torch.equal(code.zeros_as(), plain.zeros_as())


def test_blocks_do_not_change_the_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, statistics = problem()
    found = []
    for block in (1, 7, 64, 128, 500):
        monkeypatch.setattr(module, "_BLOCK", block)
        found.append(gptq(weight.double().float(), statistics, bits=3).integers())
    for other in found[1:]:  # sums in another order: a rare tie may fall the other way
        assert float((other != found[0]).float().mean()) < 0.005


def test_tiles_of_rows_do_not_change_the_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, statistics = problem(out=200)
    whole = gptq(weight, statistics, bits=3).integers()
    monkeypatch.setattr(module, "_TILE_BYTES", 1)  # 64 rows at once
    tiled = gptq(weight, statistics, bits=3).integers()
    assert float((tiled != whole).float().mean()) < 0.005


def test_rows_are_independent() -> None:
    weight, statistics = problem()
    whole = gptq(weight, statistics, bits=3).decode()
    order = torch.randperm(48, generator=torch.Generator().manual_seed(3))
    shuffled = gptq(weight[order], statistics, bits=3).decode()
    assert float((shuffled != whole[order]).float().mean()) < 0.005


def test_columns_come_back_in_their_own_order() -> None:
    """With many bits the code is the weight, however the columns were ordered on the way."""
    weight, statistics = problem(width=97)
    weight += torch.arange(97) * 0.01  # every column is at home in one place only
    for act_order in (True, False):
        decoded = gptq(weight, statistics, bits=8, group_size=8, act_order=act_order).decode()
        assert float((decoded - weight).abs().max()) < 0.02
    moment = statistics.second_moment
    assert moment is not None
    permutation = torch.randperm(97, generator=torch.Generator().manual_seed(4))
    again = Statistics(tokens=1, second_moment=moment[permutation][:, permutation])
    straight = gptq(weight, statistics, bits=3, group_size=0).decode()
    permuted = gptq(weight[:, permutation].contiguous(), again, bits=3, group_size=0).decode()
    assert float((permuted != straight[:, permutation]).float().mean()) < 0.005


@pytest.mark.parametrize("width", [1, 5, 63, 65, 130])
@pytest.mark.parametrize("group_size", [0, 16, 64, 999])
@pytest.mark.parametrize("bits", [1, 2, 5])
def test_any_width_and_ragged_groups(width: int, group_size: int, bits: int) -> None:
    weight, statistics = problem(out=6, width=width)
    moment = statistics.second_moment
    assert moment is not None
    code = gptq(weight, statistics, bits=bits, group_size=group_size, scale_bits=6)
    assert code.shape == (6, width)
    assert code.nbytes == GroupInt.size(6, width, bits, group_size, zeros=True, scale_bits=6)
    plain = rtn(weight, statistics, bits=bits, group_size=group_size, scale_bits=6)
    errors = [weighted_error(c.decode() - weight, moment) for c in (code, plain)]
    assert errors[0] <= 1.05 * errors[1] + 1e-9


def test_dead_channels_are_rounded_and_disturb_nothing() -> None:
    weight, statistics = problem()
    moment = statistics.second_moment
    assert moment is not None
    moment = moment.clone()
    dead = torch.tensor([0, 17, 127])
    moment[dead], moment[:, dead] = 0.0, 0.0
    code = gptq(weight, Statistics(tokens=1, second_moment=moment), bits=4, clip=False)
    plain = rtn(weight, Statistics(), bits=4, clip=False)
    assert bool(torch.isfinite(code.decode()).all())
    assert torch.equal(code.integers()[:, dead], plain.integers()[:, dead])
    silent = gptq(weight, Statistics(tokens=1, second_moment=torch.zeros(128, 128)), bits=4)
    assert float((silent.decode() - weight).abs().max()) < 0.05


def test_fewer_tokens_than_channels() -> None:
    """A singular H is damped, and less damping is more of the feedback."""
    weight, _ = problem()
    x = torch.randn(9, 128, generator=torch.Generator().manual_seed(5))
    moment = x.t() @ x / 9
    statistics = Statistics(tokens=9, second_moment=moment)
    plain = weighted_error(rtn(weight, statistics, bits=3).decode() - weight, moment)
    errors = [
        weighted_error(gptq(weight, statistics, bits=3, damp=damp).decode() - weight, moment)
        for damp in (1e-3, 0.1, 100.0)
    ]
    assert errors[0] < errors[1] < errors[2]
    assert errors[1] < 0.3 * plain
    assert errors[2] == pytest.approx(plain, rel=0.1)


def test_a_moment_that_is_none_is_refused() -> None:
    weight, _ = problem()
    indefinite = torch.eye(128)
    indefinite[0, 1] = indefinite[1, 0] = 1e9
    with pytest.raises(PliantError, match="positive definite"):
        gptq(weight, Statistics(tokens=1, second_moment=indefinite))
    with pytest.raises(PliantError, match="second moment"):
        gptq(weight, Statistics())


def test_a_factor_that_was_begun_is_the_same_and_one_that_failed_is_made_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight, statistics = problem()
    plain = gptq(weight, statistics, bits=3).integers()
    calls = []
    real = inverse_factor
    monkeypatch.setattr(module, "inverse_factor", lambda *a, **k: calls.append(1) or real(*a, **k))
    begun = Statistics(tokens=1, second_moment=statistics.second_moment)
    begin_factor(begun, damp=0.1, act_order=True)
    assert torch.equal(gptq(weight, begun, bits=3).integers(), plain)
    assert not calls
    gptq(weight, begun, bits=3, act_order=False)  # another than the one that was begun
    assert len(calls) == 1
    shifted = torch.eye(128)
    shifted[0, 1] = shifted[1, 0] = 1.3  # positive definite with a damping of 1.0, not of 0.1
    failing = Statistics(tokens=1, second_moment=shifted)
    alone = gptq(weight, failing, bits=3).integers()
    again = Statistics(tokens=1, second_moment=shifted)
    begin_factor(again, damp=0.1, act_order=True)
    held = module._FACTORS[again][0.1, True]
    assert isinstance(held, module._Begun)
    assert int(held.failed) != 0
    assert torch.equal(gptq(weight, again, bits=3).integers(), alone)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_not_waited_for_when_a_factor_is_begun() -> None:
    statistics = problem()[1]
    assert statistics.second_moment is not None
    there = [Statistics(tokens=1, second_moment=statistics.second_moment.cuda()) for _ in range(2)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        begin_factor(there[0], damp=0.1, act_order=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found, alone = (shared_factor(own, damp=0.1, act_order=True) for own in there)
    assert torch.equal(found[0], alone[0])
    assert torch.equal(found[1], alone[1])


@pytest.mark.parametrize("act_order", [True, False])
def test_factor_is_that_of_the_damped_inverse(act_order: bool) -> None:
    moment = correlated(40)
    before = moment.clone()
    factor, order = inverse_factor(moment, damp=0.05, act_order=act_order)
    assert torch.equal(moment, before), "the statistics are not touched"
    damped = moment.double() + 0.05 * moment.double().diagonal().mean() * torch.eye(40)
    damped = damped[order][:, order]
    product = factor.double().t() @ factor.double() @ damped
    torch.testing.assert_close(product, torch.eye(40).double(), atol=1e-3, rtol=0)
    assert torch.equal(factor, factor.triu())
    falling = moment.diagonal()[order]
    assert not act_order or bool((falling[1:] <= falling[:-1]).all())


def test_scales_are_rounded_before_integers_are_chosen() -> None:
    """Coarse scales: what is last in the order is still within half a stored step."""
    weight, _ = problem()
    statistics = Statistics(tokens=1, second_moment=torch.eye(128))
    code = gptq(weight, statistics, bits=4, group_size=16, scale_bits=4, clip=False)
    scale, zero = (v.repeat_interleave(16, 1) for v in (code.scales_as(), code.zeros_as()))
    nearest = weight.clamp((0 - zero) * scale, (15 - zero) * scale)
    assert float(((code.decode() - nearest).abs() / scale).max()) <= 0.5 + 1e-3


def test_one_symmetric_bit() -> None:
    weight, statistics = problem()
    moment = statistics.second_moment
    assert moment is not None
    options = {"bits": 1, "group_size": 32, "symmetric": True}
    code = gptq(weight, statistics, **options)
    grouped = code.decode().abs().view(48, -1, 32)
    assert torch.equal(grouped, grouped[..., :1].expand_as(grouped))
    plain = rtn(weight, statistics, **options)
    errors = [weighted_error(c.decode() - weight, moment) for c in (code, plain)]
    assert errors[0] < errors[1]


def test_clipping_pays_at_the_outputs() -> None:
    weight, statistics = problem()
    moment = statistics.second_moment
    assert moment is not None
    weight[:, 5] *= 6
    searched, plain = (
        weighted_error(gptq(weight, statistics, bits=2, clip=clip).decode() - weight, moment)
        for clip in (True, False)
    )
    assert searched < plain


def test_zero_and_constant_rows_are_finite() -> None:
    weight, statistics = problem()
    weight[0], weight[1] = 0.0, 0.25
    for bits in (1, 2, 4):
        decoded = gptq(weight, statistics, bits=bits, scale_bits=6).decode()
        assert bool(torch.isfinite(decoded).all())
        assert float(decoded[0].abs().max()) < 1e-5


def test_the_factor_is_shared_by_rungs_and_not_by_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, statistics = problem()
    calls = []
    real = inverse_factor
    monkeypatch.setattr(module, "inverse_factor", lambda *a, **k: calls.append(1) or real(*a, **k))
    first = [gptq(weight, statistics, bits=bits).integers() for bits in (2, 3, 4)]
    assert len(calls) == 1
    other = Statistics(tokens=1, second_moment=correlated(128, seed=9))
    gptq(weight, other)
    assert len(calls) == 2
    gptq(weight, statistics, damp=0.5)  # another factor, then the first one again
    assert torch.equal(gptq(weight, statistics, bits=2).integers(), first[0])
