"""CBQ's parts on a window of two plain layers: rounding, truncation, and what it never does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pliant.codes import Code, Dense, GroupInt
from pliant.errors import PliantError
from pliant.methods import find
from pliant.methods.reconstruct.cbq import LowRankRounding, cbq, truncation
from pliant.methods.window import Weights, Window, decoded, token_error
from pliant.observe.statistics import Statistics

torch.set_num_threads(1)
FAST = {"steps": 40, "rate": 3e-2, "batch": 8}


def quantized(weight: Tensor, bits: int = 3, **options: object) -> GroupInt:
    code = find("rtn").function(weight, Statistics(), bits=bits, group_size=16, **options)
    assert isinstance(code, GroupInt)
    return code


def problem() -> tuple[Window, dict[str, Code]]:
    torch.manual_seed(0)
    weights = {"a": torch.randn(48, 40) / 6, "b": torch.randn(40, 48) / 6}

    def run(given: Weights, hidden: Tensor) -> Tensor:
        held = {**weights, **given}
        return hidden + torch.tanh(hidden @ held["a"].t()) @ held["b"].t()

    x = torch.randn(32, 6, 40)
    drifted = x + 0.02 * torch.randn_like(x)
    window = Window(weights, run, drifted, run({}, x), torch.device("cpu"))
    return window, {name: quantized(weight) for name, weight in weights.items()}


def test_the_window_gets_closer_and_bytes_stay() -> None:
    window, codes = problem()
    made = cbq(window, codes, homologous=0.0, **FAST)  # type: ignore[arg-type]
    before, after = (window.error(decoded(c, window.device)) for c in (codes, made))
    assert after < 0.85 * before
    assert {n: c.nbytes for n, c in made.items()} == {n: c.nbytes for n, c in codes.items()}


def test_homologous_targets_are_the_sum_of_both_losses() -> None:
    window, codes = problem()
    made = cbq(window, codes, homologous=1.0, **FAST)  # type: ignore[arg-type]
    own = torch.cat([found for _, found in window.through(window.weights, 8)])
    before, after = (window.error(decoded(c, window.device), 8, own) for c in (codes, made))
    assert after < 0.85 * before


def test_what_is_no_group_integer_stays_and_what_is_worse_is_not_returned() -> None:
    window, codes = problem()
    kept = Dense(window.weights["b"].half())
    made = cbq(window, {"a": codes["a"], "b": kept}, **FAST)  # type: ignore[arg-type]
    assert torch.equal(made["b"].decode(), kept.decode())
    assert not torch.equal(made["a"].decode(), codes["a"].decode())
    wild = cbq(window, codes, steps=3, rate=50.0, scale_rate=5.0, truncate=False)
    assert all(torch.equal(wild[n].decode(), codes[n].decode()) for n in codes)


def test_low_rank_rounding_starts_as_the_code_and_moves_at_most_one_step() -> None:
    torch.manual_seed(0)
    weight = torch.randn(12, 40)
    code = quantized(weight)
    latent = LowRankRounding(code, weight, 5, torch.Generator().manual_seed(0))
    assert torch.equal(latent.encode().integers(), code.integers())
    latent.weight().square().sum().backward()  # type: ignore[no-untyped-call]
    assert latent.b.grad is not None
    assert float(latent.b.grad.abs().sum()) > 0
    with torch.no_grad():
        latent.b += 20 * torch.randn_like(latent.b)
    moved = latent.encode().integers().int() - code.integers().int()
    assert set(moved.unique().tolist()) == {-1, 0, 1}


def test_truncation_finds_the_gap_above_the_bulk() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 64).clamp(-3, 3)
    assert truncation(torch.rand(64, 64)) == pytest.approx(1.0, abs=1e-2), "no outlier, no cut"
    weight[3, 5], weight[9, 60] = 12.0, -15.0
    assert 2.5 < truncation(weight) <= 3.0


def test_a_grid_without_outliers_is_taken_where_it_helps() -> None:
    window, _ = problem()
    wide = dict(window.weights)
    wide["a"] = wide["a"].clone()
    wide["a"][0, 0] = 6.0
    start = {n: quantized(w, clip=False) for n, w in wide.items()}
    here = Window(wide, window.run, window.inputs, window.outputs, window.device)
    off = cbq(here, start, steps=0, truncate=False)
    on = cbq(here, start, steps=0)
    assert torch.equal(off["a"].decode(), start["a"].decode())
    assert not torch.equal(on["a"].decode(), start["a"].decode())
    errors = [here.error(decoded(c, here.device), wanted=here.outputs) for c in (off, on)]
    assert errors[1] < errors[0]


def test_token_error_is_relative() -> None:
    wanted = torch.randn(2, 3, 8)
    found = wanted * 1.1
    torch.testing.assert_close(token_error(found, wanted), torch.full((2, 3), 0.01))
    torch.testing.assert_close(token_error(100 * found, 100 * wanted), torch.full((2, 3), 0.01))


def test_impossible_options_are_told() -> None:
    window, codes = problem()
    for options in ({"homologous": 2.0}, {"rank": 0}, {"batch": 0}):
        with pytest.raises(PliantError, match="cbq takes"):
            cbq(window, codes, **options)  # type: ignore[arg-type]
