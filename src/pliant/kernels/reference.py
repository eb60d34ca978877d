"""Reference kernels: compositions by their algebra, all else decoded a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from pliant.codes import (
    BlockRotated,
    Code,
    ColumnStack,
    Dense,
    GroupInt,
    LowRank,
    Permuted,
    Rotated,
    RowStack,
    Scaled,
    Signed,
    Sparse,
    Sum,
)
from pliant.kernels.dispatch import matmul, register

SCRATCH = 2**20  # bytes of decoded rows held at once, beside the tiles that a code decodes by
_FEW = 64  # products with a sign matrix that cost no more than decoding its magnitudes
GPU_SCRATCH = 2**28  # on a GPU, where a launch costs as much as decoding some 100,000 weights


@register(Code)  # type: ignore[type-abstract]
def by_row_tiles(x: Tensor, code: Code) -> Tensor:
    """Decode a tile of rows, multiply, forget it: the matrix is never whole in memory."""
    y = x.new_empty(x.shape[0], code.shape[0])
    for tile in row_tiles(x, code):
        y[:, tile] = F.linear(x, code.rows(tile, x.dtype))
    return y


@register(GroupInt)
def group_int(x: Tensor, code: Code) -> Tensor:
    """Tile after tile through the same memory; a single vector meets its tile in the cache."""
    assert isinstance(code, GroupInt)
    y = x.new_empty(x.shape[0], code.shape[0])
    room: Tensor | None = None
    for tile in row_tiles(x, code):
        rows = tile.stop - tile.start
        room = x.new_empty(rows, code.width) if room is None else room[:rows]
        y[:, tile] = F.linear(x, code.rows_into(room, tile))
    return y


def row_tiles(x: Tensor, code: Code) -> Iterator[slice]:
    out, width = code.shape
    scratch = SCRATCH if x.device.type == "cpu" else GPU_SCRATCH
    step = max(1, scratch // max(width * x.element_size(), 1))
    for start in range(0, out, step):
        yield slice(start, min(start + step, out))


@register(Dense)
def dense(x: Tensor, code: Code) -> Tensor:
    assert isinstance(code, Dense)
    if code.values.dtype == x.dtype or torch.is_autocast_enabled(x.device.type):
        return F.linear(x, code.values)
    return by_row_tiles(x, code)


@register(Sum)
def total(x: Tensor, code: Code) -> Tensor:
    assert isinstance(code, Sum)
    y = matmul(x, code.parts[0])
    for part in code.parts[1:]:
        y += matmul(x, part)
    return y


@register(LowRank)
def low_rank(x: Tensor, code: Code) -> Tensor:
    assert isinstance(code, LowRank)
    return matmul(matmul(x.float(), code.b), code.a).to(x.dtype)


@register(Rotated)
def rotated(x: Tensor, code: Code) -> Tensor:
    assert isinstance(code, Rotated)
    return matmul(Rotated.rotate(x, code.seed).to(x.dtype), code.inner)


@register(BlockRotated)
def block_rotated(x: Tensor, code: Code) -> Tensor:
    assert isinstance(code, BlockRotated)
    return matmul(code.rotate(x).to(x.dtype), code.inner)


@register(Permuted)
def permuted(x: Tensor, code: Code) -> Tensor:
    assert isinstance(code, Permuted)
    return matmul(code.gather(x), code.inner)


@register(Scaled)
def scaled(x: Tensor, code: Code) -> Tensor:
    assert isinstance(code, Scaled)
    y = matmul(x if code.in_scale is None else (x * code.in_scale.float()).to(x.dtype), code.inner)
    return y if code.out_scale is None else (y * code.out_scale.float()).to(x.dtype)


@register(Signed)
def signed(x: Tensor, code: Code) -> Tensor:
    """(S * A B) x = sum over k of a_k * S (b_k * x): for few inputs, without the product A B."""
    assert isinstance(code, Signed)
    inner = code.inner
    if not isinstance(inner, LowRank) or not 0 < x.shape[0] * inner.rank <= _FEW:
        return by_row_tiles(x, code)
    a, b = inner.a.decode(), inner.b.decode()
    spread = (x.float()[:, None, :] * b).flatten(0, 1)  # [n rank, in]
    y = torch.empty(x.shape[0], code.shape[0], device=x.device)
    for tile in row_tiles(spread, code):
        seen = F.linear(spread, code.sign_rows(tile)).view(x.shape[0], inner.rank, -1)
        y[:, tile] = (seen * a[tile].t()).sum(1)
    return y.to(x.dtype)


@register(RowStack)
def row_stack(x: Tensor, code: Code) -> Tensor:
    assert isinstance(code, RowStack)
    return torch.cat([matmul(x, part) for part in code.parts], dim=-1)


@register(ColumnStack)
def column_stack(x: Tensor, code: Code) -> Tensor:
    assert isinstance(code, ColumnStack)
    slices = code.split(x)
    y = matmul(slices[0], code.parts[0])
    for piece, part in zip(slices[1:], code.parts[1:], strict=True):
        y += matmul(piece, part)
    return y


@register(Sparse)
def sparse(x: Tensor, code: Code) -> Tensor:
    """Each value times its column of x, added to its row, a bounded number at a time."""
    assert isinstance(code, Sparse)
    row, column = code.coordinates()
    columns = x.float().t().contiguous()  # [in, n]
    y = columns.new_zeros(code.shape[0], x.shape[0])
    step = max(1, SCRATCH // (4 * x.shape[0]))
    for start in range(0, row.numel(), step):
        part = slice(start, start + step)
        products = columns[column[part]] * code.values[part].float()[:, None]
        y.index_add_(0, row[part], products)
    return y.t().to(x.dtype)
