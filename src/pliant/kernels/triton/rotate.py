"""What codes in another basis do to activations, each in one launch: turn, gather, scale.

Rotated: a Hadamard matrix of a power of two is a Kronecker product of H_a and H_b, so a block of
a b inputs, as a matrix X [a, b], becomes H_a X H_b: two small products on tensor cores. tf32 holds
the entries of H, and 16-bit inputs, exactly; other values are cut into two parts. A program makes
at most 4096 outputs of a row; of a larger block it first adds up the parts of that many inputs,
as the upper bits of its place have it. Signs are computed, not stored. Any width: a program for
each part of each power of two in it.

BlockRotated: a program turns some rows by one block. Rows may be of 16 or 32 bits and have any
strides; all work is in float32, rounded once, at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, dtype, empty, float32

from pliant.codes.rotated import blocks as powers
from pliant.kernels.streams import launched_on

_PART = 4096  # outputs of a program
_WIDE = 1024  # inputs that a program gathers


@triton.jit  # type: ignore[untyped-decorator]
def _signs(column, seed):  # type: ignore[no-untyped-def]
    """+1 or -1, of SplitMix64's top bit; seed: its 32 bits, as a signed integer."""
    z = (column + 1).to(tl.int64) + (seed.to(tl.int64) << 32)
    z = z.to(tl.uint64) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return 1.0 - 2.0 * ((z ^ (z >> 31)) >> 63).to(tl.int32).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _parity(bits):  # type: ignore[no-untyped-def]
    """Of the set bits of a small integer, as +1 (even) or -1."""
    bits ^= bits >> 8
    bits ^= bits >> 4
    bits ^= bits >> 2
    bits ^= bits >> 1
    return 1.0 - 2.0 * (bits & 1).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _parts(value):  # type: ignore[no-untyped-def]
    """Two floats that add up to `value`: what tf32 holds of it, and the rest."""
    high = (value.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return high, value - high


@triton.jit  # type: ignore[untyped-decorator]
def _rotate_part(  # type: ignore[no-untyped-def]
    x, y, x_column, seed, part,
    START: tl.constexpr, SIZE: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    INVERSE: tl.constexpr, SHORT: tl.constexpr,
):  # fmt: skip
    """Outputs part A B, ..., (part + 1) A B - 1 of the block of SIZE inputs from START.

    SHORT: tf32 holds the inputs.
    """
    TALL: tl.constexpr = max(A, 16)  # which a product takes at least
    WIDE: tl.constexpr = max(B, 16)
    i, j = tl.arange(0, TALL), tl.arange(0, WIDE)
    held = (i < A)[:, None] & (j < B)[None, :]
    within = i[:, None] * B + j[None, :]
    seen = tl.zeros((TALL, WIDE), tl.float32)
    for other in tl.static_range(SIZE // (A * B)):
        column = START + other * A * B + within
        value = tl.load(x + column * x_column, mask=held, other=0.0).to(tl.float32)
        if not INVERSE:
            value *= _signs(column, seed)
        seen += value * _parity(part & other)
    # Inputs beyond the block are zero, and outputs beyond it are not stored.
    right, left = _parity(j[:, None] & j[None, :]), _parity(i[:, None] & i[None, :])
    if SHORT and SIZE == A * B:
        seen = tl.dot(seen, right, input_precision="tf32")
    else:
        high, low = _parts(seen)
        seen = tl.dot(low, right, input_precision="tf32")
        seen = tl.dot(high, right, seen, input_precision="tf32")
    high, low = _parts(seen)
    seen = tl.dot(left, low, input_precision="tf32")
    seen = tl.dot(left, high, seen, input_precision="tf32") * (SIZE**-0.5)
    column = START + part * A * B + within
    if INVERSE:
        seen *= _signs(column, seed)
    tl.store(y + column, seen.to(y.dtype.element_ty), mask=held)


@triton.jit  # type: ignore[untyped-decorator]
def _rotate_block(  # type: ignore[no-untyped-def]
    x, y, x_column, seed, part,
    WIDTH: tl.constexpr, BIT: tl.constexpr, PART: tl.constexpr,
    INVERSE: tl.constexpr, SHORT: tl.constexpr,
):  # fmt: skip
    """That part, if there is one, of the block of 2**BIT inputs; a part has 2**PART at most."""
    FEW: tl.constexpr = min(BIT, PART)
    if (part >= 0) & (part < (1 << (BIT - FEW))):
        _rotate_part(
            x, y, x_column, seed, part, (WIDTH >> (BIT + 1)) << (BIT + 1), 1 << BIT,
            1 << (FEW - FEW // 2), 1 << (FEW // 2), INVERSE, SHORT,
        )  # fmt: skip
    return part - (1 << (BIT - FEW))


@triton.jit(do_not_specialize=["seed"])  # type: ignore[untyped-decorator]
def _rotate(  # type: ignore[no-untyped-def]
    x, y, x_row, x_column, seed,
    WIDTH: tl.constexpr, BITS: tl.constexpr, PART: tl.constexpr,
    INVERSE: tl.constexpr, SHORT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x += row * x_row
    y += row * WIDTH
    part = tl.program_id(1)
    for k in tl.static_range(BITS):  # the largest block first
        if (WIDTH >> (BITS - 1 - k)) & 1:
            part = _rotate_block(
                x, y, x_column, seed, part, WIDTH, BITS - 1 - k, PART, INVERSE, SHORT
            )


@triton.jit  # type: ignore[untyped-decorator]
def _turn(  # type: ignore[no-untyped-def]
    x, y, blocks, tail, n, x_row, x_column, width, count, size, block, down, across,
    tail_down, tail_across, B: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """N rows times one block, or times the tail; down, across: strides of a block's rows, columns.

    block: from one block to the next, 0 where all inputs share it.
    """
    place = tl.program_id(1)
    row = tl.program_id(0) * N + tl.arange(0, N)
    j = tl.arange(0, B)
    column = place * size + j
    here = (j < size) & (column < width)
    held = (row < n)[:, None] & here[None, :]
    x_places = row.to(tl.int64)[:, None] * x_row + column[None, :] * x_column
    seen = tl.load(x + x_places, mask=held, other=0.0).to(tl.float32)
    square = here[:, None] & here[None, :]
    last = (column >= count * size)[None, :]
    entry = blocks + place * block + j[:, None] * down + j[None, :] * across
    turned = tl.load(entry, mask=square & ~last, other=0.0).to(tl.float32)
    entry = tail + j[:, None] * tail_down + j[None, :] * tail_across
    turned += tl.load(entry, mask=square & last, other=0.0).to(tl.float32)
    seen = tl.dot(seen, turned, input_precision=PRECISION)
    y_places = row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(y + y_places, seen.to(y.dtype.element_ty), mask=held)


@triton.jit  # type: ignore[untyped-decorator]
def _arrange(  # type: ignore[no-untyped-def]
    x, y, order, scale, x_row, x_column, width,
    GATHER: tl.constexpr, SCALE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    held = column < width
    source = tl.load(order + column, mask=held, other=0).to(tl.int32) if GATHER else column
    value = tl.load(x + row * x_row + source * x_column, mask=held, other=0.0).to(tl.float32)
    if SCALE:
        value *= tl.load(scale + column, mask=held, other=0.0).to(tl.float32)
    tl.store(y + row * width + column, value.to(y.dtype.element_ty), mask=held)


def rotate(
    x: Tensor,  # [n, in], any strides, bf16, fp16 or fp32
    seed: int,
    to: dtype | None = None,
    *,
    inverse: bool = False,
) -> Tensor:
    """x Q of `Rotated`, or with `inverse` x Q^T, as a new [n, in] of dtype `to` (x.dtype)."""
    n, width = x.shape
    y = empty(n, width, dtype=to or x.dtype, device=x.device)
    if not y.numel():
        return y
    parts = sum(max(1, size // _PART) for size in powers(width))
    signed = seed - 2**32 if seed >= 2**31 else seed
    with launched_on(x.device):
        _rotate[n, parts](
            x, y, x.stride(0), x.stride(1), signed,
            WIDTH=width, BITS=width.bit_length(), PART=_PART.bit_length() - 1,
            INVERSE=inverse, SHORT=x.dtype != float32, num_warps=8,
        )  # fmt: skip
    return y


def turn(x: Tensor, blocks: Tensor, tail: Tensor, to: dtype | None = None) -> Tensor:
    """x [n, in] times the block diagonal matrix of `BlockRotated`, blocks and tail of any strides.

    A new [n, in] of dtype `to` (x.dtype).
    """
    n, width = x.shape
    y = empty(n, width, dtype=to or x.dtype, device=x.device)
    if not y.numel():
        return y
    size = blocks.shape[-1]
    count = width // size
    rows = 16 if n <= 16 else 64
    with launched_on(x.device):
        _turn[triton.cdiv(n, rows), triton.cdiv(width, size)](
            x, y, blocks, tail, n, x.stride(0), x.stride(1), width, count, size,
            blocks.stride(0) if len(blocks) > 1 else 0, blocks.stride(1), blocks.stride(2),
            tail.stride(0), tail.stride(1),
            B=max(triton.next_power_of_2(size), 16), N=rows,
            PRECISION="tf32x3" if x.dtype == float32 else "tf32",
        )  # fmt: skip
    return y


def arrange(x: Tensor, order: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """x [n, in] in another order (order [in], any integers) times factors [in]; a new [n, in]."""
    n, width = x.shape
    y = empty(n, width, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    with launched_on(x.device):
        _arrange[n, triton.cdiv(width, _WIDE)](
            x, y, x if order is None else order, x if scale is None else scale,
            x.stride(0), x.stride(1), width,
            GATHER=order is not None, SCALE=scale is not None, WIDE=_WIDE,
        )  # fmt: skip
    return y
