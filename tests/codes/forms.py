"""Random codes of every form, for the property tests of codes and kernels."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from pliant.codes import (
    BlockRotated,
    Code,
    Codebook,
    ColumnStack,
    Dense,
    GroupInt,
    GroupLevels,
    LowRank,
    Permuted,
    Rotated,
    RowStack,
    Scaled,
    Signed,
    Sparse,
    Sum,
    Ternary,
    power_scales,
    quantize_scales,
)

torch.set_num_threads(1)

LEAVES = ["group_int", "group_levels", "codebook", "ternary", "sparse", "dense", "low_rank"]
SHAPES = st.tuples(st.integers(1, 23), st.integers(1, 150))


def integers(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, high, shape, dtype=torch.uint8)


def group_int(
    out: int, width: int, bits: int = 4, group: int = 32, scale_bits: int = 16, zeros=True
):
    groups = -(-width // min(group, width))
    zero = integers(2**bits, out, groups) if zeros else None
    scales = torch.rand(out, groups) + 0.01
    return GroupInt.pack(integers(2**bits, out, width), scales, zero, bits, group, scale_bits)


def group_levels(
    out: int, width: int, bits: int = 4, group: int = 32, tables: int = 1, powers=False, size=16
):
    """With `powers` the scales are of `size` bits, 16 meaning a row's factor beside three bits."""
    groups = -(-width // min(group, width))
    if powers:
        factor = torch.rand(out) + 0.5 if size == 16 else None
        exponents = torch.randint(-9, 3, (out, groups))
        scales = power_scales(exponents, 3 if size == 16 else size, factor)
    else:
        scales = quantize_scales(torch.rand(out, groups) + 0.01, size)
    selector = integers(tables, out, groups) if tables > 1 else None
    levels = torch.randn(tables, 2**bits)
    return GroupLevels.pack(integers(2**bits, out, width), scales, levels, selector, bits, group)


def orthogonal(size: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(size, size)).Q


@st.composite
def leaves(draw: st.DrawFn, out: int, width: int) -> Code:
    kind = draw(st.sampled_from(LEAVES))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    bits, group = draw(st.integers(1, 8)), draw(st.integers(1, 160))
    if kind == "group_int":
        scale_bits = draw(st.sampled_from([16, 4, 5, 6, 7, 8]))
        return group_int(out, width, bits, group, scale_bits, draw(st.booleans()))
    if kind == "group_levels":
        size, tables = draw(st.sampled_from([16, 4, 6, 8])), draw(st.sampled_from([1, 2, 3, 4, 5]))
        return group_levels(out, width, bits, group, tables, draw(st.booleans()), size)
    if kind == "codebook":
        group = min(group, width)
        level_rows = draw(st.sampled_from([1, out]))
        levels = torch.randn(level_rows, -(-width // group), 2**bits)
        return Codebook.pack(integers(2**bits, out, width), levels, bits, group)
    if kind == "ternary":
        scales = torch.rand(out, -(-width // min(group, width))) + 0.01
        scale_bits = draw(st.sampled_from([16, 4, 6]))
        return Ternary.pack(integers(3, out, width), scales, group, scale_bits)
    if kind == "sparse":
        keep = torch.rand(out, width) < draw(st.sampled_from([0.0, 0.02, 0.3, 1.0]))
        return Sparse.from_dense(torch.randn(out, width), keep)
    if kind == "dense":
        dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
        return Dense(torch.randn(out, width).to(dtype))
    rank = draw(st.integers(0, 5))
    if rank and draw(st.booleans()):
        return LowRank(group_int(out, rank, 8), group_int(rank, width, 4))
    return LowRank.from_factors(torch.randn(out, rank), torch.randn(rank, width))


@st.composite
def codes(draw: st.DrawFn, depth: int = 2, shape: tuple[int, int] | None = None) -> Code:
    """Any form, nested up to `depth`."""
    out, width = draw(SHAPES) if shape is None else shape
    forms = ["leaf", "sum", "rotated", "scaled", "signed", "permuted", "row_stack", "column_stack"]
    forms.append("block_rotated")
    kind = draw(st.sampled_from(forms))
    if depth == 0 or kind == "leaf":
        return draw(leaves(out, width))
    if kind == "sum":
        return Sum(tuple(draw(codes(depth - 1, (out, width))) for _ in range(2)))
    if kind in ("row_stack", "column_stack"):
        whole = out if kind == "row_stack" else width
        cut = draw(st.integers(0, whole))
        sizes = [size for size in (cut, whole - cut) if size]
        if kind == "row_stack":
            return RowStack(tuple(draw(codes(depth - 1, (size, width))) for size in sizes))
        return ColumnStack(tuple(draw(codes(depth - 1, (out, size))) for size in sizes))
    inner = draw(codes(depth - 1, (out, width)))
    if kind == "rotated":
        return Rotated(inner, draw(st.integers(0, 9)))
    if kind == "signed":
        return Signed.of(torch.rand(out, width) < 0.5, inner)
    if kind == "block_rotated":
        size = draw(st.integers(1, min(width, 64)))
        count = draw(st.sampled_from([1, width // size]))
        blocks = [orthogonal(size) for _ in range(count)]
        return BlockRotated.by(inner, torch.stack(blocks), orthogonal(width % size))
    if kind == "permuted":
        return Permuted.by(inner, torch.randperm(width))
    scales = [(torch.rand(size) + 0.5).half() for size in (out, width)]
    used = [scale if draw(st.booleans()) else None for scale in scales]
    return Scaled(inner, used[0], used[1])
