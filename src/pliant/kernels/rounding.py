"""The kernels that quantizing has on a device: search for scales, rounding with error feedback."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

# (loss, scale, table) of each group from weight, tables, importance, group size, shares of the
# scale that clips nothing, and the least scale.
LevelSearch = Callable[
    [Tensor, Tensor, Tensor, int, Sequence[float], float], tuple[Tensor, Tensor, Tensor]
]


class GpuSearch(Protocol):
    """Searches that are one launch; shapes are in `pliant.kernels.triton.search`."""

    def search_grid(
        self, weight: Tensor, bits: int, symmetric: bool, importance: Tensor, group_size: int,
        clips: Sequence[float],
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip

    def learn_levels(
        self, weight: Tensor, tables: Tensor, stored: Tensor, importance: Tensor, group_size: int,
        clips: Sequence[float], smallest: float, rounds: int, whole: bool,
    ) -> Tensor: ...  # fmt: skip


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


def level_search(device: torch.device, group_size: int) -> LevelSearch | None:
    """Triton's on a GPU, the native one on a CPU with a compiler; None: torch."""
    if device.type == "cuda":
        from pliant.kernels.triton import search

        return search.search_levels if group_size <= search.LONGEST else None
    from pliant.kernels.cpu import rounding

    return rounding.search_levels if rounding.available() else None


def gpu_search(device: torch.device, group_size: int) -> GpuSearch | None:
    """What a GPU searches besides levels, for groups that a program holds; None: torch."""
    if device.type != "cuda":
        return None
    from pliant.kernels.triton import search

    return cast(GpuSearch, search) if group_size <= search.LONGEST else None
