"""EoRA: at equal bytes, less error at the outputs than the plain SVD of the error."""

from __future__ import annotations

import pytest
import torch

from pliant.errors import PliantError
from pliant.methods.catalog import find
from pliant.methods.numerics import weighted_error
from pliant.methods.repair.eora import eora
from pliant.methods.repair.lorc import lorc
from pliant.observe.statistics import Statistics

torch.set_num_threads(1)


def problem() -> tuple[torch.Tensor, Statistics]:
    """Inputs whose energy falls as a power law over rotated directions."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(128, 128)).Q
    energy = torch.arange(1, 129).float() ** -1.5
    return torch.randn(96, 128) * 0.05, Statistics(second_moment=(basis * energy) @ basis.T)


@pytest.mark.parametrize("base", ["rtn", "gptq"])
@pytest.mark.parametrize("bits", [2, 3])
def test_eora_beats_svd_beats_none_at_the_outputs(base: str, bits: int) -> None:
    weight, statistics = problem()
    moment = statistics.second_moment
    assert moment is not None
    ratios = []
    for rank in (4, 16, 48):
        options = {"base": base, "rank": rank, "bits": bits}
        plain, aware = lorc(weight, statistics, **options), eora(weight, statistics, **options)
        none = find(base).function(weight, statistics, bits=bits)
        assert plain.nbytes == aware.nbytes
        errors = [weighted_error(weight - c.decode(), moment) for c in (aware, plain, none)]
        assert errors[0] < 0.95 * errors[1]
        assert errors[1] < errors[2]
        ratios.append(errors[0] / errors[2])
    assert ratios[0] > ratios[1] > ratios[2], "a higher rank repairs more"
    if base == "rtn":
        assert ratios[0] < 0.5


def test_full_rank_restores_the_weight() -> None:
    weight, statistics = problem()
    code = eora(weight, statistics, rank=96, bits=2)
    assert float((code.decode() - weight).abs().max()) < 2e-3 * float(weight.abs().max())


def test_white_inputs_make_it_lorc() -> None:
    weight, _ = problem()
    white = Statistics(second_moment=torch.eye(128))
    same = [m(weight, white, base="rtn", rank=8, bits=3).decode() for m in (eora, lorc)]
    torch.testing.assert_close(same[0], same[1], rtol=1e-3, atol=1e-4)


def test_eight_bit_factors_keep_the_gain() -> None:
    weight, statistics = problem()
    moment = statistics.second_moment
    assert moment is not None
    none = weighted_error(
        weight - find("rtn").function(weight, statistics, bits=2).decode(), moment
    )
    gains = [
        none
        - weighted_error(
            weight - eora(weight, statistics, base="rtn", bits=2, factor_bits=bits).decode(), moment
        )
        for bits in (16, 8)
    ]
    assert gains[1] > 0.97 * gains[0] > 0


def test_missing_statistics_are_told() -> None:
    with pytest.raises(PliantError, match="second moment"):
        eora(torch.zeros(2, 2), Statistics())
