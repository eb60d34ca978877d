"""Products with group codes, codebooks and ternary codes, from their stored bytes.

Any width, group size and batch. One loop over the bytes of the narrowest plane; the fields of a
byte are inputs far apart, so each field is a tile of neighbouring inputs, multiplied on its own
(see `pliant.codes.packing`). Five trits of a byte are five neighbours: a field is every fifth
input. Weights are rounded to x's dtype, as decoding to it rounds them; sums are float32.

A codebook is a group code whose groups have tables of their own and no scale; a ternary code is
one of 0 bits, its middle 1.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pliant.codes import Codebook, GroupInt, GroupLevels, PowerScales, Signed, Ternary
from pliant.codes.packing import PLANES, plane_bytes
from pliant.kernels.streams import launched_on

Packed = GroupInt | GroupLevels | Codebook | Ternary

_HALF, _INTEGERS, _POWERS, _TABLES = 0, 1, 2, 3  # kinds of scales; a codebook has tables instead
_TRITS = 5  # in a byte


@triton.jit  # type: ignore[untyped-decorator]
def _packed(first, second, third, rows, columns, count, mask, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Stored integers at rows x columns (broadcast together) of planes of `count` columns."""
    value = (rows * 0 + columns * 0).to(tl.int32)
    if BITS == 8:
        value += tl.load(first + rows * count + columns, mask=mask, other=0).to(tl.int32)
    else:
        place = first
        if BITS >= 4:
            value += _plane(place, rows, columns, count, mask, 4)
            place = second
        if BITS % 4 >= 2:
            value += _plane(place, rows, columns, count, mask, 2) << (BITS // 4 * 4)
            place = third if BITS >= 4 else second
        if BITS % 2 == 1:
            value += _plane(place, rows, columns, count, mask, 1) << (BITS - 1)
    return value


@triton.jit  # type: ignore[untyped-decorator]
def _plane(plane, rows, columns, count, mask, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    size = (count * WIDTH + 7) // 8
    byte = tl.load(plane + rows * size + columns % size, mask=mask, other=0).to(tl.int32)
    return (byte >> (columns // size * WIDTH)) & ((1 << WIDTH) - 1)


@triton.jit  # type: ignore[untyped-decorator]
def _trits(packed, rows, byte, count, mask, FIELD: tl.constexpr):  # type: ignore[no-untyped-def]
    """Digit FIELD, to the base 3, of stored bytes; `count` a row."""
    value = tl.load(packed + rows * count + byte, mask=mask, other=0).to(tl.int32)
    # 2**24 / 3**(FIELD + 1), rounded up: the product's fraction is that digit and those below.
    part: tl.constexpr = ((1 << 24) - 1) // 3 ** (FIELD + 1) + 1
    return ((value * part) & 0xFFFFFF) * 3 >> 24


@triton.jit  # type: ignore[untyped-decorator]
def _weights(  # type: ignore[no-untyped-def]
    row, k, byte, size, out, width, groups, group_size,
    q0, q1, q2, s0, s1, s2, row_scale, base, z0, z1, z2, tables,
    BITS: tl.constexpr, LEVELS: tl.constexpr, SCALES: tl.constexpr, SCALE_BITS: tl.constexpr,
    ROW_SCALE: tl.constexpr, ZERO_BITS: tl.constexpr, ONE_GROUP: tl.constexpr,
    FIELD: tl.constexpr,
):  # fmt: skip
    """W at row [M] x k [K], the inputs of FIELD of byte [K] of `size`, float32.

    ONE_GROUP: all of k lies in the group of its first.
    base: what an exponent is stored less; for a codebook, the groups from one row's tables to the
    next row's, 0 where rows share them.
    """
    rows = row.to(tl.int64)[:, None]
    inside = row[:, None] < out
    if BITS == 0:
        q = _trits(q0, rows, byte[None, :], size, inside & (byte[None, :] < size), FIELD)
    else:
        q = _packed(q0, q1, q2, rows, k[None, :], width, inside & (k[None, :] < width), BITS)
    if ONE_GROUP:
        group = (tl.min(k, axis=0) // group_size + tl.arange(0, 1))[None, :]
    else:
        group = (k // group_size)[None, :]
    there = inside & (group < groups)
    if SCALES == 3:
        table = tables + ((rows * base + group) << BITS)
        return tl.load(table + q, mask=there, other=0.0).to(tl.float32)
    if SCALES == 0:
        scale = tl.load(s0 + rows * groups + group, mask=there, other=0.0).to(tl.float32)
    else:
        stored = _packed(s0, s1, s2, rows, group, groups, there, SCALE_BITS)
        if SCALES == 1:
            scale = stored.to(tl.float32)
        else:
            exponent = tl.minimum(tl.maximum(stored + base, 1), 254)
            scale = (exponent << 23).to(tl.float32, bitcast=True)
        if ROW_SCALE:
            factor = tl.load(row_scale + rows, mask=inside, other=0.0).to(tl.float32)
            scale *= factor * (1.0 / (1 << SCALE_BITS)) if SCALES == 1 else factor
    if LEVELS:
        if ZERO_BITS > 0:
            q += _packed(z0, z1, z2, rows, group, groups, there, ZERO_BITS) << BITS
        return tl.load(tables + q).to(tl.float32) * scale
    if ZERO_BITS > 0:
        zero = _packed(z0, z1, z2, rows, group, groups, there, ZERO_BITS).to(tl.float32)
        return (q.to(tl.float32) - zero) * scale
    middle: tl.constexpr = 1 if BITS == 0 else 0.5 if BITS == 1 else (1 << BITS) // 2
    return (q.to(tl.float32) - middle) * scale


@triton.jit  # type: ignore[untyped-decorator]
def _inputs(byte, field, size, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The inputs whose weights are that field of those bytes."""
    if BITS == 0:
        return byte * 5 + field
    return field * size + byte


@triton.jit  # type: ignore[untyped-decorator]
def _multiply(  # type: ignore[no-untyped-def]
    x, y, n, x_row, x_column, y_row, size,
    out, width, groups, group_size,
    q0, q1, q2, s0, s1, s2, row_scale, base, z0, z1, z2, tables,
    BITS: tl.constexpr, LEVELS: tl.constexpr, SCALES: tl.constexpr, SCALE_BITS: tl.constexpr,
    ROW_SCALE: tl.constexpr, ZERO_BITS: tl.constexpr, ONE_GROUP: tl.constexpr,
    FIELDS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * M + tl.arange(0, M)
    column = tl.program_id(1) * N + tl.arange(0, N)
    sums = tl.zeros((M, N), tl.float32)
    for start in range(0, size, K):
        byte = start + tl.arange(0, K)
        for field in tl.static_range(FIELDS):
            k = _inputs(byte, field, size, BITS)
            w = _weights(
                row, k, byte, size, out, width, groups, group_size,
                q0, q1, q2, s0, s1, s2, row_scale, base, z0, z1, z2, tables,
                BITS, LEVELS, SCALES, SCALE_BITS, ROW_SCALE, ZERO_BITS, ONE_GROUP, field,
            )  # fmt: skip
            held = ((byte < size) & (k < width))[:, None] & (column < n)[None, :]
            places = x + column.to(tl.int64)[None, :] * x_row + k[:, None] * x_column
            seen = tl.load(places, mask=held, other=0.0)
            sums = tl.dot(w.to(seen.dtype), seen, sums, input_precision=PRECISION)
    kept = (row < out)[:, None] & (column < n)[None, :]
    places = y + column.to(tl.int64)[None, :] * y_row + row[:, None]
    tl.store(places, sums.to(y.dtype.element_ty), mask=kept)


@triton.jit  # type: ignore[untyped-decorator]
def _decode(  # type: ignore[no-untyped-def]
    matrix, first, last, size,
    out, width, groups, group_size,
    q0, q1, q2, s0, s1, s2, row_scale, base, z0, z1, z2, tables,
    BITS: tl.constexpr, LEVELS: tl.constexpr, SCALES: tl.constexpr, SCALE_BITS: tl.constexpr,
    ROW_SCALE: tl.constexpr, ZERO_BITS: tl.constexpr, ONE_GROUP: tl.constexpr,
    FIELDS: tl.constexpr, M: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    row = first + tl.program_id(0) * M + tl.arange(0, M)
    byte = tl.program_id(1) * K + tl.arange(0, K)
    for field in tl.static_range(FIELDS):
        k = _inputs(byte, field, size, BITS)
        w = _weights(
            row, k, byte, size, out, width, groups, group_size,
            q0, q1, q2, s0, s1, s2, row_scale, base, z0, z1, z2, tables,
            BITS, LEVELS, SCALES, SCALE_BITS, ROW_SCALE, ZERO_BITS, ONE_GROUP, field,
        )  # fmt: skip
        kept = (row < last)[:, None] & ((byte < size) & (k < width))[None, :]
        places = matrix + (row - first).to(tl.int64)[:, None] * width + k[None, :]
        tl.store(places, w.to(matrix.dtype.element_ty), mask=kept)


def multiply(
    x: Tensor,  # [n, in], any strides, bf16, fp16 or fp32
    code: Packed,
    tile: tuple[int, int, int] | None = None,  # rows of W, rows of x, inputs: of a program
    warps: int = 4,
    stages: int | None = None,
    precision: str = "ieee",  # of products of float32; "tf32x3": nearly that, on tensor cores
) -> Tensor:
    """x times the transpose of `code`, [n, out] in x.dtype.

    tile and stages, where not given, are what the GPU's shared memory holds.
    """
    n, out = x.shape[0], code.shape[0]
    y = torch.empty(n, out, dtype=x.dtype, device=x.device)
    if not n or not out:
        return y
    if not code.width:
        return y.zero_()
    if tile is None:  # few rows of x: many programs, each of few rows of W
        of_w, of_x = (32, 16) if n <= 16 else (32, 64) if n <= 64 else (128, 128)
        nbytes = (of_w + of_x) * _fields(code) * x.element_size()
        deepest, most = _depth(nbytes, _shared_memory(x.device))
        tile, stages = (of_w, of_x, most), stages or deepest
    rows, columns, inputs = tile
    grid = (triton.cdiv(out, rows), triton.cdiv(n, columns))
    with launched_on(x.device):
        _multiply[grid](
            x, y, n, x.stride(0), x.stride(1), y.stride(0), _row_bytes(code),
            *_stored(code), **_kinds(code, inputs), M=rows, N=columns, K=inputs,
            PRECISION=precision if x.dtype == torch.float32 else "tf32",
            num_warps=warps, num_stages=stages or 3,
        )  # fmt: skip
    return y


def decode(
    code: Packed,
    dtype: torch.dtype,
    rows: slice = slice(None),  # of step 1
) -> Tensor:
    """Those rows of the matrix, [rows, in], in one launch."""
    first, last, _ = rows.indices(code.shape[0])
    matrix = torch.empty(max(last - first, 0), code.width, dtype=dtype, device=code.device)
    if matrix.numel():
        size = _row_bytes(code)
        tall, inputs = 16, 128
        grid = (triton.cdiv(matrix.shape[0], tall), triton.cdiv(size, inputs))
        with launched_on(matrix.device):
            _decode[grid](
                matrix, first, last, size, *_stored(code), **_kinds(code, inputs), M=tall, K=inputs
            )
    return matrix


def signs(code: Signed) -> Codebook:
    """The signs alone, as a codebook of -1 and +1."""
    width = code.shape[1]
    return Codebook((code.signs,), _plus_minus(code.device), width, 1, max(width, 1))


@cache
def _plus_minus(device: torch.device) -> Tensor:
    return torch.tensor([[[-1.0, 1.0]]], dtype=torch.float16, device=device)


def _depth(nbytes: int, room: int) -> tuple[int, int]:
    """(stages, inputs of a program): what fits, when an input takes `nbytes` in each stage."""
    for inputs in (64, 32, 16):
        for stages in (3, 2):
            if nbytes * inputs * stages <= room:
                return stages, inputs
    return 1, 16


@cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may take; of a large GPU where there is none."""
    if device.type != "cuda":
        return 227 << 10
    found = torch.cuda.get_device_properties(device)
    return int(getattr(found, "shared_memory_per_block_optin", 48 << 10))


def _fields(code: Packed) -> int:
    """Weights in a byte of the narrowest plane."""
    return _TRITS if isinstance(code, Ternary) else 8 // PLANES[code.bit_width][-1]


def _row_bytes(code: Packed) -> int:
    """Of the narrowest plane."""
    if isinstance(code, Ternary):
        return code.packed.shape[1]
    return plane_bytes(code.width, PLANES[code.bit_width][-1])


def _stored(code: Packed) -> tuple[Any, ...]:
    """The arguments from `out` to `tables`; a tensor that is not there is the weights' plane."""
    planes = (code.packed,) if isinstance(code, Ternary) else code.planes
    filler = planes[0]

    def three(planes: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        return (*(planes or ()), filler, filler, filler)[:3]

    if isinstance(code, Codebook):
        rows, groups, _ = code.levels.shape
        return (
            *code.shape, groups, code.group_size, *three(planes), *three(None), filler,
            0 if rows == 1 else groups, *three(None), code.levels,
        )  # fmt: skip
    scales = code.stored_scales
    extra = None
    if not isinstance(code, Ternary):
        extra = code.zeros if isinstance(code, GroupInt) else code.selector
    return (
        *code.shape, scales.groups, code.group_size,
        *three(planes), *three(scales.planes),
        filler if scales.row_scale is None else scales.row_scale,
        scales.base if isinstance(scales, PowerScales) else 0,
        *three(extra), code.tables if isinstance(code, GroupLevels) else filler,
    )  # fmt: skip


def _kinds(code: Packed, inputs: int) -> dict[str, Any]:
    """The constants that a kernel is compiled for."""
    zero_bits, fields = 0, _fields(code)
    if isinstance(code, GroupInt):
        zero_bits = 0 if code.zeros is None else code.bit_width
    elif isinstance(code, GroupLevels):
        zero_bits = (len(code.tables) - 1).bit_length()
    if isinstance(code, Codebook):
        groups, kind, scale_bits, row_scale = code.levels.shape[1], _TABLES, 16, False
    else:
        scales = code.stored_scales
        groups, scale_bits, row_scale = scales.groups, scales.bits, scales.row_scale is not None
        kind = _HALF if scale_bits == 16 else _INTEGERS
        kind = _POWERS if isinstance(scales, PowerScales) else kind
    span = inputs * fields if isinstance(code, Ternary) else inputs
    whole = _row_bytes(code) % inputs == 0 and code.group_size % span == 0
    return {
        "BITS": 0 if isinstance(code, Ternary) else code.bit_width,
        "LEVELS": isinstance(code, GroupLevels | Codebook),
        "SCALES": kind,
        "SCALE_BITS": scale_bits,
        "ROW_SCALE": row_scale,
        "ZERO_BITS": zero_bits,
        "ONE_GROUP": whole or groups == 1,
        "FIELDS": fields,
    }
