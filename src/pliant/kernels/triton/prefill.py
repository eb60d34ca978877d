"""Products of many rows with group integers from their stored bytes: a prompt's.

Each program multiplies a tile of W [M, K] from registers, where it was widened, with a tile of x
from shared memory, into sums [M, N]: of Hopper's warpgroup instructions W is the first operand, the
only one that may come from registers. All loads are ahead by some stages. A byte's fields are
inputs far apart, each a product of its own, so nothing is shuffled. A weight is widened by one byte
permute, which puts the integer into the mantissa of a power of two, and one fused multiply-add.
Source of the permute: Kim et al., Who Says Elephants Can't Run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pliant.codes import Code, GroupInt
from pliant.codes.packing import PLANES
from pliant.kernels.streams import launched_on
from pliant.kernels.triton.group import (
    fields,
    kinds,
    packed,
    row_bytes,
    scale_of,
    shared_memory,
    stored_arguments,
)

_ROWS, _COLUMNS, _WARPS = 128, 128, 8


@triton.jit  # type: ignore[untyped-decorator]
def _widened(bytes4, FIELD: tl.constexpr, BITS: tl.constexpr, ASSEMBLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """Field FIELD of each byte plus a power of two, 32768 for 8 bits and 128 for fewer, float32."""
    if ASSEMBLY != "":
        shift = tl.full(bytes4.shape, FIELD * BITS, tl.int32)  # constant: folded
        return tl.inline_asm_elementwise(
            ASSEMBLY, "=r,=r,=r,=r,r,r,r,r,r", [bytes4, shift], tl.float32, True, 4
        )
    value = (bytes4.to(tl.int32) >> (FIELD * BITS)) & ((1 << BITS) - 1)
    return value.to(tl.float32) + (32768.0 if BITS == 8 else 128.0)


@triton.jit  # type: ignore[untyped-decorator]
def _multiply(  # type: ignore[no-untyped-def]
    x, y, n, x_row, y_row, size,
    out, width, groups, group_size,
    q0, q1, q2, s0, s1, s2, row_scale, base, z0, z1, z2, tables,
    BITS: tl.constexpr, LEVELS: tl.constexpr, SCALES: tl.constexpr, SCALE_BITS: tl.constexpr,
    ROW_SCALE: tl.constexpr, ZERO_BITS: tl.constexpr, ONE_GROUP: tl.constexpr,
    FIELDS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    STAGES: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(out, M)
    row = tl.program_id(0) % blocks * M + tl.arange(0, M)
    column = tl.program_id(0) // blocks * N + tl.arange(0, N)
    rows, place = row.to(tl.int64)[:, None], tl.arange(0, K)
    inside, there = (row < out)[:, None], (column < n)[None, :]
    weights = q0 + rows * size + place[None, :]
    inputs = x + column.to(tl.int64)[None, :] * x_row + place[:, None]
    sums = tl.zeros((M, N), tl.float32)
    power: tl.constexpr = 32768.0 if BITS == 8 else 128.0
    middle: tl.constexpr = power + (0.5 if BITS == 1 else (1 << BITS) // 2)
    for start in tl.range(0, size, K, num_stages=STAGES):
        stored = tl.load(weights + start, mask=inside, other=0)
        for field in tl.static_range(FIELDS):
            first = field * size + start
            seen = tl.load(inputs + first, mask=there, other=0.0)
            group = first // group_size + tl.zeros((1, 1), tl.int32)
            scale = scale_of(
                rows, group, groups, inside, inside, s0, s1, s2, row_scale, base,
                SCALES, SCALE_BITS, ROW_SCALE,
            )  # fmt: skip
            if ZERO_BITS > 0:
                zero = packed(z0, z1, z2, rows, group, groups, inside, ZERO_BITS).to(tl.float32)
                less = -(zero + power) * scale
            else:
                less = -middle * scale
            w = _widened(stored, field, BITS, ASSEMBLY) * scale + less
            sums = tl.dot(w.to(seen.dtype), seen, sums)
    kept = inside & there
    places = y + column.to(tl.int64)[None, :] * y_row + rows
    tl.store(places, sums.to(y.dtype.element_ty), mask=kept)


def takes(code: Code) -> bool:
    """Whether it is group integers in one plane whose tiles each lie in one group."""
    return isinstance(code, GroupInt) and len(code.planes) == 1 and _inputs(code) > 0


def multiply(
    x: Tensor,  # [n, in], rows contiguous, bf16 or fp16
    code: GroupInt,
    tile: tuple[int, int] = (_ROWS, _COLUMNS),  # rows of W, rows of x: of a program
    warps: int = _WARPS,
    stages: int | None = None,
) -> Tensor:
    """x times the transpose of `code` that `takes` is true of, [n, out] in x.dtype.

    stages: of loads, as many as the GPU's shared memory holds, up to three, if not given.
    """
    n, out = x.shape[0], code.shape[0]
    y = torch.empty(n, out, dtype=x.dtype, device=x.device)
    if not n or not out:
        return y
    deepest, inputs = _depth(code, tile, shared_memory(x.device))
    constants = kinds(code, inputs)
    grid = (triton.cdiv(out, tile[0]) * triton.cdiv(n, tile[1]),)
    assembly = _assembly(code.bit_width) if x.is_cuda else ""  # the interpreter has none
    with launched_on(x.device):
        _multiply[grid](
            x, y, n, x.stride(0), y.stride(0), row_bytes(code), *stored_arguments(code),
            **constants, M=tile[0], N=tile[1], K=inputs, STAGES=stages or deepest,
            ASSEMBLY=assembly, num_warps=warps,
        )  # fmt: skip
    return y


def _depth(code: GroupInt, tile: tuple[int, int], room: int) -> tuple[int, int]:
    """(stages, inputs of a tile) that fit into `room` bytes."""
    of_one, inputs = tile[0] + 2 * tile[1] * fields(code), _inputs(code)
    while inputs > 16 and 2 * inputs * of_one > room:
        inputs //= 2
    return max(1, min(3, room // (inputs * of_one))), inputs


def _inputs(code: GroupInt) -> int:
    """Of a tile, at most: what splits a row's bytes, and a group, evenly; 0 where nothing does."""
    size = row_bytes(code)
    if code.width * PLANES[code.bit_width][0] % 8:
        return 0
    for inputs in (64, 32, 16):
        if size % inputs == 0 and (code.groups == 1 or code.group_size % inputs == 0):
            return inputs
    return 0


def _assembly(bits: int) -> str:
    """Four bytes' fields, each in the mantissa of 128, or of 32768 where it takes a whole byte.

    $4: the bytes; $5: how far the field is from the lowest bit.
    """
    mask = ((1 << bits) - 1) * 0x01010101
    power, choice = (0x47000000, 0x7404) if bits == 8 else (0x43000000, 0x7044)
    step = 0x10 if bits == 8 else 0x100
    lines = ["shr.b32 t, $4, $5;", f"and.b32 t, t, {mask};"]
    lines += [f"prmt.b32 ${i}, t, {power}, {choice + i * step};" for i in range(4)]
    return "{ .reg .b32 t; " + " ".join(lines) + " }"
