"""The inner loops of quantization on a CPU: the search for scales, GPTQ's error feedback.

`round_block` and `round_block_to_levels` are twins of those in `pliant.kernels.triton.feedback`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from pliant.kernels.cpu.build import library

BLOCK = 32  # columns of a call

_IN_TORCH: ContextVar[bool] = ContextVar("in_torch", default=False)


def available() -> bool:
    """Whether the native kernels are there; they are compiled if they are not yet."""
    return not _IN_TORCH.get() and library() is not None


@contextmanager
def in_torch() -> Iterator[None]:
    """Inside, rounding takes plain torch: for what is too small to wait for a compiler."""
    token = _IN_TORCH.set(True)
    try:
        yield
    finally:
        _IN_TORCH.reset(token)


def search_levels(
    weight: Tensor,  # [out, in]
    tables: Tensor,  # [tables, levels] rising, levels on both sides of zero
    importance: Tensor,  # [in], weight of each input's squared error
    group_size: int,
    clips: Sequence[float],
    smallest: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, scale, table), each [out, groups]: the best table and scale of each group.

    Of the scale at which nothing is clipped (at least `smallest`) the shares `clips` are tried.
    """
    native = library()
    assert native is not None
    (out, width), (count, levels) = weight.shape, tables.shape
    groups = -(-width // group_size)
    weight, tables = _floats(weight), _floats(tables)
    middles = _floats((tables[:, 1:] + tables[:, :-1]) / 2)
    importance, shares = _floats(importance), torch.tensor(clips, dtype=torch.float32)
    if importance.shape != (width,) or group_size < 1:
        raise ValueError("importance must be [in] and groups of at least one")
    loss, scale = torch.empty(out, groups), torch.empty(out, groups)
    table = torch.empty(out, groups, dtype=torch.int32)
    _check(
        native.pliant_search(
            weight.data_ptr(), out, width, group_size, importance.data_ptr(), tables.data_ptr(),
            middles.data_ptr(), count, levels, shares.data_ptr(), len(shares), smallest,
            loss.data_ptr(), scale.data_ptr(), table.data_ptr(), torch.get_num_threads(),
        )
    )  # fmt: skip
    return loss, scale, table.long()


def round_block(
    columns: Tensor,  # [in, rows] float32, read
    chosen: Tensor,  # [in, rows] uint8, its rows begin:begin + count are written
    errors: Tensor,  # [BLOCK, rows] float32, its first `count` rows are written
    scales: Tensor,  # [groups, rows] float32
    zeros: Tensor,  # [groups, rows] float32
    groups: Tensor,  # [in] int32, the group of each column
    factor: Tensor,  # [in, in] upper triangular float32
    begin: int,
    count: int,
    top: int,
) -> None:
    """Round columns begin to begin + count in order, each one's error fed to those after it.

    errors gets what is left to feed to columns beyond the block, divided by factor's diagonal.
    All tensors contiguous.
    """
    native = library()
    assert native is not None
    _check_block(columns, chosen, errors, scales, zeros, groups, factor, begin, count)
    if zeros.dtype != torch.float32:
        raise ValueError("zeros must be float32")
    width, rows = columns.shape
    _check(
        native.pliant_round_integers(
            columns.data_ptr(), chosen.data_ptr(), errors.data_ptr(), rows, width, begin, count,
            groups.data_ptr(), factor.data_ptr(), scales.data_ptr(), zeros.data_ptr(), float(top),
            torch.get_num_threads(),
        )
    )  # fmt: skip


def round_block_to_levels(
    columns: Tensor,  # [in, rows] float32, read
    chosen: Tensor,  # [in, rows] uint8, its rows begin:begin + count are written
    errors: Tensor,  # [BLOCK, rows] float32, its first `count` rows are written
    scales: Tensor,  # [groups, rows] float32
    tables: Tensor,  # [groups, rows] int32, the table of each group
    levels: Tensor,  # [tables, levels] float32, rising
    groups: Tensor,  # [in] int32, the group of each column
    factor: Tensor,  # [in, in] upper triangular float32
    begin: int,
    count: int,
) -> None:
    """`round_block` to the nearest of a table's levels times the group's scale."""
    native = library()
    assert native is not None
    _check_block(columns, chosen, errors, scales, tables, groups, factor, begin, count)
    if tables.dtype != torch.int32 or not 0 <= int(tables.min()) <= int(tables.max()) < len(levels):
        raise ValueError("tables must be int32 below the number of tables")
    width, rows = columns.shape
    levels = _floats(levels)
    middles = _floats((levels[:, 1:] + levels[:, :-1]) / 2)
    _check(
        native.pliant_round_levels(
            columns.data_ptr(), chosen.data_ptr(), errors.data_ptr(), rows, width, begin, count,
            groups.data_ptr(), factor.data_ptr(), scales.data_ptr(), tables.data_ptr(),
            levels.data_ptr(), middles.data_ptr(), levels.shape[1], torch.get_num_threads(),
        )
    )  # fmt: skip


def _floats(tensor: Tensor) -> Tensor:
    return tensor.detach().float().contiguous()


def _check_block(
    columns: Tensor, chosen: Tensor, errors: Tensor, scales: Tensor, beside: Tensor,
    groups: Tensor, factor: Tensor, begin: int, count: int,
) -> None:  # fmt: skip
    width, rows = columns.shape
    floats = (columns, errors, scales, factor)
    shapes = (
        chosen.shape == (width, rows) and errors.shape[0] >= count and errors.shape[1] == rows
        and scales.shape == beside.shape and scales.shape[1] == rows
        and groups.shape == (width,) and factor.shape == (width, width)
        and begin >= 0 and 0 < count <= BLOCK and begin + count <= width
    )  # fmt: skip
    if not shapes or any(t.dtype != torch.float32 for t in floats):
        raise ValueError("a block's tensors have other shapes or types than they must")
    if chosen.dtype != torch.uint8 or groups.dtype != torch.int32:
        raise ValueError("chosen must be uint8 and groups int32")
    if not all(t.is_contiguous() for t in (*floats, chosen, beside, groups)):
        raise ValueError("a block's tensors must be contiguous")
    if not 0 <= int(groups.min()) <= int(groups.max()) < len(scales):
        raise ValueError("a column's group has no scales")


def _check(done: int) -> None:
    if not done:
        raise MemoryError("the system gives no more threads")
