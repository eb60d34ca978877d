"""Products on a GPU: the fastest kernel that a code, its batch and the machine allow.

Group codes: up to 16 rows of x of 16 bits the CUDA kernel, one launch, the low-rank and sparse
terms of a Sum added in it. Up to 64: the Triton kernel. More (prefill): decoded by one kernel, a
bounded number of rows at a time, and multiplied by the vendor's library. Without nvcc the Triton
kernels take all. Codebooks and ternary codes: the same by Triton alone. What turns, gathers or
scales x before a product is one launch of Triton's. Without Triton, or where gradients are asked
for, the reference does it all.

Off unless PLIANT_GPU_KERNELS=1 is in the environment: products were checked and timed on an H100
and an H200 (bench/kernels.py), whole models were not yet beside other projects. Off, the reference
multiplies.

All read the bytes as they are stored. A sparse term costs 4 bytes a row and up to 3 a value more.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from pliant.codes import (
    BlockRotated,
    Code,
    Codebook,
    Dense,
    GroupInt,
    GroupLevels,
    LowRank,
    Permuted,
    Rotated,
    Scaled,
    Signed,
    Sparse,
    Sum,
    Ternary,
)
from pliant.kernels import reference
from pliant.kernels.activations import rounded
from pliant.kernels.cuda import build
from pliant.kernels.cuda.decode import (
    MOST_CODES,
    MOST_ROWS,
    Terms,
    choose_shape,
    expand,
    form,
    level_digits,
    multiply,
    multiply_each,
    sparse_terms,
    vector_bytes,
)
from pliant.kernels.decoding import has_triton, launched
from pliant.kernels.dispatch import matmul, register, register_together

_FEW = 64  # rows of x up to which weights are better decoded on the way than to memory
_TOGETHER = 16384  # rows of W up to which products that share x gain by one launch (H100)


@register(GroupInt, "cuda")
@register(GroupLevels, "cuda")
def group(x: Tensor, code: Code) -> Tensor:
    """x [n, in] times a group code; [n, out] in x.dtype."""
    assert isinstance(code, GroupInt | GroupLevels)
    if _for_reference(x):
        return reference.by_row_tiles(x, code)
    library = _library(x, code)
    if library is not None:
        x = _aligned(x)
        with torch.cuda.device(x.device):
            stream = torch.cuda.current_stream().cuda_stream
            shape = choose_shape(code, len(x), library, Terms(), x.dtype)
            return multiply(x, code, library, stream, shape)
    from pliant.kernels.triton import group as triton_group

    if len(x) <= _FEW:
        return triton_group.multiply(x, code)
    return _by_decoding(x, code)


@register_together("cuda")
def together(x: Tensor, codes: Sequence[Code]) -> list[Tensor | None]:
    """One row of x times group codes: those of one form share a launch."""
    found: list[Tensor | None] = [None] * len(codes)
    if len(x) != 1 or _for_reference(x):
        return found
    alike: dict[Any, list[int]] = {}
    for i, code in enumerate(codes):
        if isinstance(code, GroupInt | GroupLevels) and _library(x, code) is not None:
            alike.setdefault(form(code), []).append(i)
    x = _aligned(x)
    for members in alike.values():
        for start in range(0, len(members), MOST_CODES):
            some = members[start : start + MOST_CODES]
            rows = sum(codes[i].shape[0] for i in some)
            if len(some) > 1 and rows <= _TOGETHER:
                for i, y in zip(some, _each(x, [codes[i] for i in some]), strict=True):
                    found[i] = y
    return found


def _each(x: Tensor, codes: list[Any]) -> list[Tensor]:
    library, rows = _library(x, codes[0]), sum(code.shape[0] for code in codes)
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        shape = choose_shape(codes[0], 1, library, Terms(), x.dtype, rows)
        return multiply_each(x, codes, library, stream, shape)


@register(Codebook, "cuda")
@register(Ternary, "cuda")
def indexed(x: Tensor, code: Code) -> Tensor:
    """x [n, in] times a codebook or a ternary code; [n, out] in x.dtype."""
    assert isinstance(code, Codebook | Ternary)
    if _for_reference(x):
        return reference.by_row_tiles(x, code)
    from pliant.kernels.triton import group as triton_group

    return triton_group.multiply(x, code) if len(x) <= _FEW else _by_decoding(x, code)


@register(Signed, "cuda")
def signed(x: Tensor, code: Code) -> Tensor:
    """As in the reference; for few inputs the signs are multiplied as they are stored."""
    assert isinstance(code, Signed)
    if _for_reference(x):
        return reference.signed(x, code)
    inner, n = code.inner, len(x)
    if not isinstance(inner, LowRank) or not 0 < n * inner.rank <= _FEW:
        return _by_decoding(x, code)
    from pliant.kernels.triton import group as triton_group

    a, b = launched(inner.a), launched(inner.b)
    spread = (x.float()[:, None, :] * b).flatten(0, 1)  # [n rank, in]
    seen = triton_group.multiply(spread, triton_group.signs(code), precision="tf32x3")
    return (seen.view(n, inner.rank, -1) * a.t()).sum(1).to(x.dtype)


def _by_decoding(x: Tensor, code: Code) -> Tensor:
    """A bounded number of rows decoded at a time, then the vendor's product."""
    tiles = list(reference.row_tiles(x, code))
    if len(tiles) == 1:
        return F.linear(x, _decoded(x, code, slice(None)))
    y = x.new_empty(len(x), code.shape[0])
    for tile in tiles:
        y[:, tile] = F.linear(x, _decoded(x, code, tile))
    return y


def _decoded(x: Tensor, code: Code, rows: slice) -> Tensor:
    """Those rows of the matrix in x.dtype: by the CUDA kernel's library, or by Triton."""
    if isinstance(code, GroupInt | GroupLevels) and vector_bytes(code) >= 8:
        library = _library(x[:1], code)
        if library is not None:
            with torch.cuda.device(x.device):
                stream = torch.cuda.current_stream().cuda_stream
                return expand(code, x.dtype == torch.float16, library, stream, rows)
    return launched(code, x.dtype, rows)


@register(Rotated, "cuda")
def rotated(x: Tensor, code: Code) -> Tensor:
    assert isinstance(code, Rotated)
    if _for_reference(x):
        return reference.rotated(x, code)
    from pliant.kernels.triton import rotate

    return matmul(rotate.rotate(x, code.seed), code.inner)


@register(BlockRotated, "cuda")
def block_rotated(x: Tensor, code: Code) -> Tensor:
    assert isinstance(code, BlockRotated)
    if _for_reference(x):
        return reference.block_rotated(x, code)
    from pliant.kernels.triton import rotate

    return matmul(rotate.turn(x, code.blocks, code.tail), code.inner)


@register(Permuted, "cuda")
def permuted(x: Tensor, code: Code) -> Tensor:
    assert isinstance(code, Permuted)
    if _for_reference(x):
        return reference.permuted(x, code)
    from pliant.kernels.triton import rotate

    return matmul(rotate.arrange(x, order=code.order), code.inner)


@register(Scaled, "cuda")
def scaled(x: Tensor, code: Code) -> Tensor:
    assert isinstance(code, Scaled)
    if _for_reference(x):
        return reference.scaled(x, code)
    from pliant.kernels.triton import rotate

    x = x if code.in_scale is None else rotate.arrange(x, scale=code.in_scale)
    y = matmul(x, code.inner)
    return y if code.out_scale is None else rotate.arrange(y, scale=code.out_scale)


@register(Sum, "cuda")
def total(x: Tensor, code: Code) -> Tensor:
    """A group code with a low-rank and a sparse term added in its launch; other sums by parts."""
    assert isinstance(code, Sum)
    if not wanted():
        return reference.total(x, code)
    base, low, sparse, rest = _split(code)
    library = None if base is None else _library(x, base, terms=bool(low or sparse))
    wants_grad = torch.is_grad_enabled() and x.requires_grad
    if base is None or library is None or wants_grad or rounded(x, base) is not x:
        return reference.total(x, code)
    x = _aligned(x)
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        values, columns, starts = (None,) * 3 if sparse is None else _entries(sparse)
        terms = Terms(values=values, columns=columns, starts=starts)
        if low is not None and isinstance(low.a, Dense) and isinstance(low.b, Dense):
            middle = torch.empty(len(x), low.rank, device=x.device)
            counters = _counters(x.device, stream)
            terms = replace(
                terms, factor=low.a.values, middle=middle, b=low.b.values, counters=counters
            )
        shape = choose_shape(base, len(x), library, terms, x.dtype)
        y = multiply(x, base, library, stream, shape, terms)
    for part in rest:
        y += matmul(x, part)
    return y


def _split(
    code: Sum,
) -> tuple[GroupInt | GroupLevels | None, LowRank | None, Sparse | None, list[Code]]:
    """(group code, low-rank term, sparse term, the others): what one launch takes, and the rest."""
    base = low = sparse = None
    rest: list[Code] = []
    for part in code.parts:
        if base is None and isinstance(part, GroupInt | GroupLevels):
            base = part
        elif low is None and isinstance(part, LowRank) and _fusible(part):
            low = part
        elif sparse is None and isinstance(part, Sparse):
            sparse = part
        else:
            rest.append(part)
    return base, low, sparse, rest


def _fusible(code: LowRank) -> bool:
    dense = [f.values for f in (code.a, code.b) if isinstance(f, Dense)]
    return (
        len(dense) == 2
        and 0 < code.rank <= 1024  # rows of A lie in shared memory
        and all(v.dtype in (torch.float16, torch.bfloat16) and v.is_contiguous() for v in dense)
        and code.shape[1] % 8 == 0
        and dense[1].data_ptr() % 16 == 0
    )


_ENTRIES: WeakKeyDictionary[Code, tuple[Tensor, Tensor, Tensor]] = WeakKeyDictionary()


def _entries(code: Sparse) -> tuple[Tensor, Tensor, Tensor]:
    if code not in _ENTRIES:
        _ENTRIES[code] = sparse_terms(code)
    return _ENTRIES[code]


def _library(x: Tensor, code: GroupInt | GroupLevels, terms: bool = False) -> Any:
    """The CUDA kernel for this product, or None where it has none."""
    if len(x) > MOST_ROWS or x.dtype not in (torch.float16, torch.bfloat16):
        return None
    if not vector_bytes(code):
        return None
    return build.library(code.bit_width, level_digits(code), x.dtype == torch.float16, terms)


def _aligned(x: Tensor) -> Tensor:
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


@cache
def _counters(device: torch.device, stream: int) -> Tensor:
    """Where the blocks of a launch count what they have done: zero between launches."""
    return torch.zeros(2, dtype=torch.int32, device=device)


def _for_reference(x: Tensor) -> bool:
    """Whether these kernels are off, or x asks for gradients, which they have none of."""
    return not wanted() or (torch.is_grad_enabled() and x.requires_grad)


def wanted() -> bool:
    """Whether the kernels of this file are turned on, and Triton is there."""
    return os.environ.get("PLIANT_GPU_KERNELS") == "1" and has_triton()
