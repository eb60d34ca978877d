"""The native inner loops of quantization find what plain torch finds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pliant.kernels.cpu import rounding
from pliant.kernels.cpu.build import library
from pliant.methods import feedback
from pliant.methods.grid import fit_grid
from pliant.methods.levels import fit_levels
from pliant.methods.quantize import gptq

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler")


@pytest.fixture(params=["plain", "avx2", "avx512"], autouse=True)
def isa(request: pytest.FixtureRequest) -> object:
    native = library()
    assert native is not None
    order = ["plain", "avx2", "avx512"]
    if native.pliant_use(order.index(request.param)).decode() != request.param:
        native.pliant_use(2)
        pytest.skip(f"this processor has no {request.param}")
    yield
    native.pliant_use(2)


@settings(max_examples=12, deadline=None)
@given(
    out=st.integers(1, 9), width=st.integers(1, 90), size=st.sampled_from([0, 7, 16, 40]),
    bits=st.integers(1, 4), tables=st.integers(1, 3), clip=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_search_finds_the_least_error(
    out: int, width: int, size: int, bits: int, tables: int, clip: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, width, generator=generator)
    importance = torch.rand(width, generator=generator) + 0.01
    table = torch.randn(tables, 2**bits, generator=generator).sort(1).values
    table[:, 0], table[:, -1] = -1.0, 1.5
    table = table.clamp(-1.0, 1.5).sort(1).values
    found = fit_levels(weight, table, size, importance=importance, clip=clip)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounding, "available", lambda: False)
        expected = fit_levels(weight, table, size, importance=importance, clip=clip)
    assert float(found.loss) == pytest.approx(float(expected.loss), rel=1e-4, abs=1e-7)
    assert found.group_size == expected.group_size
    # Another scale only where both are as good.
    same = (found.scales == expected.scales).float().mean()
    assert same > 0.8 or float(found.loss) == pytest.approx(float(expected.loss), rel=1e-6)


@pytest.mark.parametrize(("out", "width", "size"), [(70, 72, 32), (3, 33, 16), (1, 1, 1)])
@pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (4, True), (8, False)])
def test_integers_are_those_of_the_loop(
    monkeypatch: pytest.MonkeyPatch, out: int, width: int, size: int, bits: int, symmetric: bool
) -> None:
    weight, factor, order = problem(out, width)
    grid = fit_grid(weight, bits, size, symmetric=symmetric)
    blocks = gptq.round_with_feedback(weight, grid, factor, order)
    monkeypatch.setattr(gptq, "block_kernels", lambda device: None)
    looped = gptq.round_with_feedback(weight, grid, factor, order)
    # Only values between two integers may differ, by the order of additions.
    assert (blocks == looped).float().mean() > 0.99


@pytest.mark.parametrize(("out", "width", "size"), [(70, 72, 32), (3, 33, 16), (1, 1, 1)])
@pytest.mark.parametrize("tables", [1, 3])
def test_levels_are_those_of_the_loop(
    monkeypatch: pytest.MonkeyPatch, out: int, width: int, size: int, tables: int
) -> None:
    weight, factor, order = problem(out, width)
    table = torch.randn(tables, 8, generator=torch.Generator().manual_seed(1)).sort(1).values
    table[:, 0], table[:, -1] = -2.0, 2.0
    grid = fit_levels(weight, table.clamp(-2, 2).sort(1).values, size)
    groups = order // size
    columns = weight.t()[order].contiguous()
    kernels = rounding
    blocks = feedback._round_blocks(
        kernels, columns.clone(), groups, factor, grid, slice(0, out)  # type: ignore[arg-type]
    )  # fmt: skip
    looped = feedback.round_columns(
        columns.clone(), groups.tolist(), factor, grid.columns(slice(0, out)).nearest
    )
    assert (blocks == looped).float().mean() > 0.99


def problem(out: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(out)
    weight = torch.randn(out, width, generator=generator)
    x = torch.randn(256, width, generator=generator)
    return weight, *gptq.inverse_factor(x.t() @ x / 256)


def test_what_does_not_fit_is_refused() -> None:
    columns, scales = torch.randn(8, 3), torch.ones(2, 3)
    fine = {
        "columns": columns, "chosen": torch.zeros(8, 3, dtype=torch.uint8),
        "errors": torch.zeros(32, 3), "scales": scales, "zeros": torch.zeros(2, 3),
        "groups": torch.zeros(8, dtype=torch.int32), "factor": torch.eye(8),
        "begin": 0, "count": 8, "top": 3,
    }  # fmt: skip
    rounding.round_block(**fine)
    wrong = {
        "begin": 1, "count": 33, "groups": torch.full((8,), 2, dtype=torch.int32),
        "chosen": torch.zeros(8, 3), "factor": torch.eye(7), "zeros": torch.zeros(2, 3).double(),
        "errors": torch.zeros(4, 3), "scales": torch.ones(3, 2).t(),
    }  # fmt: skip
    for name, value in wrong.items():
        with pytest.raises(ValueError):
            rounding.round_block(**{**fine, name: value})
