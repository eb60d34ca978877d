"""GPTQ's inner loop as one launch gives the integers of the loop it replaces.

Without a GPU it runs in Triton's interpreter.
"""

from __future__ import annotations

from typing import cast

import pytest
import torch

pytest.importorskip("triton")

from pliant.kernels.rounding import BlockKernels
from pliant.kernels.triton import feedback as triton_feedback
from pliant.methods import feedback
from pliant.methods.grid import fit_grid
from pliant.methods.levels import fit_levels
from pliant.methods.quantize import gptq

KERNELS = cast(BlockKernels, triton_feedback)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    ("out", "width", "group_size"), [(70, 72, 32), (64, 96, 0), (3, 33, 16), (33, 300, 64)]
)
@pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (4, True)])
def test_integers_are_those_of_the_loop(
    out: int, width: int, group_size: int, bits: int, symmetric: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(out)
    weight = torch.randn(out, width, generator=generator).to(DEVICE)
    x = torch.randn(256, width, generator=generator).to(DEVICE)
    moment = x.t() @ x / 256
    grid = fit_grid(weight, bits, group_size, symmetric=symmetric)
    factor, order = gptq.inverse_factor(moment)
    size = group_size or width
    columns = weight.t()[order].contiguous()
    scales, zeros = grid.scales.t().contiguous(), grid.zeros.t().contiguous()
    launched = gptq._round_blocks(
        KERNELS, columns.clone(), scales, zeros, order // size, factor, grid.top
    )
    monkeypatch.setattr(gptq, "block_kernels", lambda device: None)  # torch, column by column
    looped = gptq._round_tile(
        columns.cpu(), _on_cpu(grid), slice(0, out), factor.cpu(), order.cpu()
    )
    same = (launched.cpu() == looped).float().mean()
    assert same > 0.995, "only values between two integers may differ, by the order of additions"
    if bits == 4:
        assert launched.float().std() > 1  # it rounded to many integers


def _on_cpu(grid: object) -> object:
    import dataclasses

    return dataclasses.replace(grid, scales=grid.scales.cpu(), zeros=grid.zeros.cpu())  # type: ignore[type-var,attr-defined]


@pytest.mark.parametrize(("out", "width", "group_size"), [(70, 72, 32), (3, 33, 16), (5, 300, 64)])
@pytest.mark.parametrize("tables", [1, 3])
def test_levels_are_those_of_the_loop(out: int, width: int, group_size: int, tables: int) -> None:
    generator = torch.Generator().manual_seed(out)
    weight = torch.randn(out, width, generator=generator).to(DEVICE)
    x = torch.randn(256, width, generator=generator).to(DEVICE)
    levels = torch.randn(tables, 8, generator=generator).sort(1).values
    levels[:, 0], levels[:, -1] = -2.0, 2.0
    grid = fit_levels(weight, levels, group_size)
    factor, order = gptq.inverse_factor(x.t() @ x / 256)
    groups = order // group_size
    columns = weight.t()[order].contiguous()
    launched = feedback._round_blocks(KERNELS, columns.clone(), groups, factor, grid, slice(0, out))
    nearest = grid.columns(slice(0, out)).nearest
    looped = feedback.round_columns(columns.clone(), groups.tolist(), factor, nearest)
    assert (launched == looped).float().mean() > 0.995
    assert launched.unique().numel() > 4
