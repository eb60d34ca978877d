"""The kernels that rounding with error feedback has on a device."""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor


class BlockKernels(Protocol):
    """Rounding of up to BLOCK columns in one call; shapes are in `pliant.kernels.cpu.rounding`."""

    BLOCK: int

    def round_block(
        self, columns: Tensor, chosen: Tensor, errors: Tensor, scales: Tensor, zeros: Tensor,
        groups: Tensor, factor: Tensor, begin: int, count: int, top: int,
    ) -> None: ...  # fmt: skip

    def round_block_to_levels(
        self, columns: Tensor, chosen: Tensor, errors: Tensor, scales: Tensor, tables: Tensor,
        levels: Tensor, groups: Tensor, factor: Tensor, begin: int, count: int,
    ) -> None: ...  # fmt: skip


def block_kernels(device: torch.device) -> BlockKernels | None:
    """Triton's on a GPU, native ones on a CPU with a compiler; None: torch, column by column."""
    if device.type == "cuda":
        from pliant.kernels.triton import feedback

        return cast(BlockKernels, feedback)
    from pliant.kernels.cpu import rounding

    return cast(BlockKernels, rounding) if rounding.available() else None
