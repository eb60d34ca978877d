"""What lies between the products of one token: norms, rotary attention, the gated activation.

Few launches, and all of them fit for a CUDA graph: the token and its position are read from
tensors, nothing depends on a value that the host would have to know. Sums are float32.

early: with programmatic dependent launch (compute capability 9.0 and above) each kernel lets the
next one start at once, and waits until the one before it is over. So a product's weights are on
their way while these kernels run. Before the wait a kernel reads only what no kernel of the same
token writes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pliant.codes import GroupInt, GroupLevels
from pliant.kernels.streams import launched_on
from pliant.kernels.triton.group import _kinds, _row_bytes, _stored, _weights

TILE = 64  # keys and values that a program of attention takes at once
_MOST_PARTS = 64  # programs that share the keys and values of a head
_PROGRAMS = 264  # of attention: two on each multiprocessor of a large GPU


@triton.jit  # type: ignore[untyped-decorator]
def _begin(EARLY: tl.constexpr):  # type: ignore[no-untyped-def]
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit  # type: ignore[untyped-decorator]
def _embed(  # type: ignore[no-untyped-def]
    token, row, first, size,
    out, width, groups, group_size,
    q0, q1, q2, s0, s1, s2, row_scale, base, z0, z1, z2, tables,
    BITS: tl.constexpr, LEVELS: tl.constexpr, SCALES: tl.constexpr, SCALE_BITS: tl.constexpr,
    ROW_SCALE: tl.constexpr, ZERO_BITS: tl.constexpr, ONE_GROUP: tl.constexpr,
    FIELDS: tl.constexpr, K: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    _begin(EARLY)
    index = tl.load(token) - first
    if (index < 0) | (index >= out):
        return
    rows = index.to(tl.int32) + tl.arange(0, 1)
    byte = tl.program_id(0) * K + tl.arange(0, K)
    for field in tl.static_range(FIELDS):
        k = field * size + byte
        w = _weights(
            rows, k, byte, size, out, width, groups, group_size,
            q0, q1, q2, s0, s1, s2, row_scale, base, z0, z1, z2, tables,
            BITS, LEVELS, SCALES, SCALE_BITS, ROW_SCALE, ZERO_BITS, ONE_GROUP, field,
        )  # fmt: skip
        kept = ((byte < size) & (k < width))[None, :]
        tl.store(row + k[None, :], w.to(row.dtype.element_ty), mask=kept)


@triton.jit  # type: ignore[untyped-decorator]
def _add_norm(  # type: ignore[no-untyped-def]
    residual, more, weight, x, width, epsilon,
    MORE: tl.constexpr, WIDTH: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, WIDTH)
    held = column < width
    scale = tl.load(weight + column, mask=held, other=0.0).to(tl.float32)  # before the wait
    _begin(EARLY)
    h = tl.load(residual + column, mask=held, other=0.0).to(tl.float32)
    if MORE:
        h += tl.load(more + column, mask=held, other=0.0).to(tl.float32)
        tl.store(residual + column, h.to(residual.dtype.element_ty), mask=held)
    h *= 1.0 / tl.sqrt(tl.sum(h * h, axis=0) / width + epsilon)
    tl.store(x + column, (h * scale).to(x.dtype.element_ty), mask=held)


@triton.jit  # type: ignore[untyped-decorator]
def _gated(gate, up, x, width, WIDTH: tl.constexpr, EARLY: tl.constexpr):  # type: ignore[no-untyped-def]
    _begin(EARLY)
    column = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    held = column < width
    g = tl.load(gate + column, mask=held, other=0.0).to(tl.float32)
    u = tl.load(up + column, mask=held, other=0.0).to(tl.float32)
    tl.store(x + column, (g / (1.0 + tl.exp(-g)) * u).to(x.dtype.element_ty), mask=held)


@triton.jit  # type: ignore[untyped-decorator]
def _states(  # type: ignore[no-untyped-def]
    states, bias, head, d, held, D,
    BIAS: tl.constexpr,
):  # fmt: skip
    """Of heads [H, 1] the numbers at d [1, D], with the layer's bias, float32."""
    place = head * D + d
    s = tl.load(states + place, mask=held, other=0.0).to(tl.float32)
    if BIAS:
        s += tl.load(bias + place, mask=held, other=0.0).to(tl.float32)
    return s


@triton.jit  # type: ignore[untyped-decorator]
def _rotated(  # type: ignore[no-untyped-def]
    states, bias, norm, cosines, sines, head, inside, epsilon, D,
    DIM: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Heads [H] (where inside) of a query or key, normed, at their position: float32 [H, DIM]."""
    d = tl.arange(0, DIM)[None, :]
    half = D // 2
    held = inside[:, None] & (d < D)
    other = tl.where(d < half, d + half, d - half)
    a = _states(states, bias, head[:, None], d, held, D, BIAS)
    b = _states(states, bias, head[:, None], other, held, D, BIAS)
    if NORM:
        scale = (1.0 / tl.sqrt(tl.sum(a * a, axis=1) / D + epsilon))[:, None]
        a *= scale * tl.load(norm + d, mask=d < D, other=0.0).to(tl.float32)
        b *= scale * tl.load(norm + other, mask=d < D, other=0.0).to(tl.float32)
    place = tl.where(d < half, d, d - half)
    cos = tl.load(cosines + place, mask=d < D, other=0.0)
    sin = tl.load(sines + place, mask=d < D, other=0.0)
    return a * cos + tl.where(d < half, -b, b) * sin


@triton.jit  # type: ignore[untyped-decorator]
def _stored_tile(  # type: ignore[no-untyped-def]
    keys, values, start, tile, at, D,
    DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Keys and values [TILE, DIM] of a head's tile as they are stored, 0 from token `at` on."""
    n, d = tile * TILE + tl.arange(0, TILE), tl.arange(0, DIM)
    held = (n < at)[:, None] & (d < D)[None, :]
    place = start + n.to(tl.int64)[:, None] * D + d[None, :]
    return tl.load(keys + place, mask=held, other=0.0), tl.load(
        values + place, mask=held, other=0.0
    )


@triton.jit  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    q, k, v, q_bias, k_bias, v_bias, q_norm, k_norm, cosines, sines, position,
    keys, values, sums, peaks, totals,
    heads, shared, capacity, parts, D, epsilon, scale,
    HEADS: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr, BIAS: tl.constexpr,
    NORM: tl.constexpr, PRECISE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One part of the tokens, for all query heads that share a key head.

    Tiles of tokens go round among the parts, so that a short sequence is shared out too and what
    lies beyond it costs nothing. Each is fetched while the one before it is worked on.
    """
    kv, part = tl.program_id(0), tl.program_id(1)
    at = tl.load(position).to(tl.int32)  # of the new token, whose key and value are still to store
    tiles = at // TILE + 1
    start = kv.to(tl.int64) * capacity * D
    key, value = _stored_tile(keys, values, start, part, at, D, DIM, TILE)
    _begin(EARLY)
    if part >= tiles:
        return
    member = tl.arange(0, HEADS)
    head = kv * shared + member
    query = _rotated(
        q, q_bias, q_norm, cosines, sines, head, member < shared, epsilon, D, DIM, BIAS, NORM
    )
    own = kv + tl.arange(0, 1)
    here = own >= 0
    d = tl.arange(0, DIM)
    new_key = _rotated(
        k, k_bias, k_norm, cosines, sines, own, here, epsilon, D, DIM, BIAS, NORM
    ).to(keys.dtype.element_ty)  # fmt: skip
    new_value = _states(
        v, v_bias, own[:, None], d[None, :], (d < D)[None, :], D, BIAS
    ).to(values.dtype.element_ty)  # fmt: skip
    if at // TILE % parts == part:
        place = start + at.to(tl.int64) * D + d[None, :]
        tl.store(keys + place, new_key, mask=(d < D)[None, :])
        tl.store(values + place, new_value, mask=(d < D)[None, :])
    peak = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    mixed = tl.zeros((HEADS, DIM), tl.float32)
    for tile in range(part, tiles, parts):
        n = tile * TILE + tl.arange(0, TILE)
        newest = (n == at)[:, None]
        k_tile, v_tile = tl.where(newest, new_key, key), tl.where(newest, new_value, value)
        key, value = _stored_tile(keys, values, start, tile + parts, at, D, DIM, TILE)
        if PRECISE:
            k_tile, v_tile = k_tile.to(tl.float32), v_tile.to(tl.float32)
        scores = tl.dot(query.to(k_tile.dtype), tl.trans(k_tile), input_precision="ieee") * scale
        scores = tl.where((n <= at)[None, :], scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, axis=1))
        weights = tl.exp(scores - higher[:, None])
        fade = tl.exp(peak - higher)
        total = total * fade + tl.sum(weights, axis=1)
        mixed = mixed * fade[:, None]
        mixed += tl.dot(weights.to(v_tile.dtype), v_tile, input_precision="ieee")
        peak = higher
    slot = part * heads + head
    tl.store(peaks + slot, peak, mask=member < shared)
    tl.store(totals + slot, total, mask=member < shared)
    held = (member < shared)[:, None] & (d < D)[None, :]
    tl.store(sums + slot[:, None] * D + d[None, :], mixed, mask=held)


@triton.jit  # type: ignore[untyped-decorator]
def _combine(  # type: ignore[no-untyped-def]
    sums, peaks, totals, position, x, heads, parts, D,
    PARTS: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The parts of one query head become its row of x."""
    _begin(EARLY)
    head = tl.program_id(0)
    there = tl.minimum(tl.load(position).to(tl.int32) // TILE + 1, parts)
    part = tl.arange(0, PARTS)
    d = tl.arange(0, DIM)
    slot = part * heads + head
    peak = tl.load(peaks + slot, mask=part < there, other=float("-inf"))
    weight = tl.exp(peak - tl.max(peak, axis=0))
    total = tl.sum(weight * tl.load(totals + slot, mask=part < there, other=0.0), axis=0)
    held = (part < there)[:, None] & (d < D)[None, :]
    mixed = tl.load(sums + slot[:, None] * D + d[None, :], mask=held, other=0.0)
    y = tl.sum(mixed * weight[:, None], axis=0) / total
    tl.store(x + head * D + d, y.to(x.dtype.element_ty), mask=d < D)


def embed(
    token: Tensor,  # int64 [1]
    code: GroupInt | GroupLevels,
    first: int,  # the token of the code's first row
    row: Tensor,  # [in], written if the token is one of the code's
    early: bool = False,
) -> None:
    """Write the row of `code` that is the token's, rounded to row.dtype."""
    size, inputs = _row_bytes(code), 256
    kinds = _kinds(code, inputs)
    with launched_on(row.device):
        _embed[(triton.cdiv(size, inputs),)](
            token, row, first, size, *_stored(code), **kinds, K=inputs, EARLY=early,
            **_launch(early),
        )  # fmt: skip


def add_norm(
    residual: Tensor,  # float32 [hidden], `more` is added to it
    more: Tensor | None,  # [1, hidden], or None: nothing to add
    weight: Tensor,  # [hidden]
    epsilon: float,
    x: Tensor,  # [1, hidden], to write
    early: bool = False,
) -> Tensor:
    """x = RMSNorm(residual + more) * weight ("Root Mean Square Layer Normalization")."""
    width = residual.numel()
    with launched_on(x.device):
        _add_norm[(1,)](
            residual, residual if more is None else more, weight, x, width, epsilon,
            MORE=more is not None, WIDTH=triton.next_power_of_2(width), EARLY=early,
            num_warps=min(max(triton.next_power_of_2(width) // 512, 4), 16), **_launch(early),
        )  # fmt: skip
    return x


def gated(gate: Tensor, up: Tensor, x: Tensor, early: bool = False) -> Tensor:
    """x = SiLU(gate) * up, all [1, inner]."""
    width = gate.numel()
    with launched_on(x.device):
        _gated[(triton.cdiv(width, 512),)](
            gate, up, x, width, WIDTH=512, EARLY=early, **_launch(early)
        )
    return x


@dataclass(frozen=True, eq=False)
class Heads:
    """How a layer's attention is laid out, and what its kernels hand to each other.

    norms: weights [head_dim] of the norms of queries and keys, or None. epsilon: theirs. scale: of
    the scores. cosines, sines: float32 [head_dim / 2] of the position, for all layers.
    """

    heads: int
    kv_heads: int
    head_dim: int
    capacity: int
    epsilon: float
    scale: float
    cosines: Tensor
    sines: Tensor
    sums: Tensor  # float32 [parts, heads, head_dim]
    peaks: Tensor  # float32 [parts, heads]
    totals: Tensor  # float32 [parts, heads]
    tile: int = TILE

    @property
    def parts(self) -> int:
        return self.peaks.shape[0]

    @classmethod
    def make(
        cls, heads: int, kv_heads: int, head_dim: int, capacity: int, epsilon: float, scale: float,
        device: torch.device, tile: int = TILE, parts: int | None = None,
    ) -> Heads:  # fmt: skip
        """parts: programs that share a head's tokens; by default as many as keep a GPU busy."""
        if parts is None:
            parts = min(triton.cdiv(capacity, tile), _MOST_PARTS, max(_PROGRAMS // kv_heads, 1))

        def room(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=device)

        return cls(
            heads, kv_heads, head_dim, capacity, epsilon, scale,
            room(head_dim // 2), room(head_dim // 2),
            room(parts, heads, head_dim), room(parts, heads), room(parts, heads), tile,
        )  # fmt: skip


def attend(
    shape: Heads,
    states: tuple[Tensor, Tensor, Tensor],  # query [1, heads head_dim], key and value likewise
    biases: tuple[Tensor, Tensor, Tensor] | None,
    norms: tuple[Tensor, Tensor] | None,  # weights [head_dim] of the query's norm and the key's
    position: Tensor,  # int64 [1], of the new token: as many are stored
    keys: Tensor,  # [1, kv_heads, capacity, head_dim], the new key is written
    values: Tensor,
    x: Tensor,  # [1, heads head_dim], to write
    early: bool = False,
) -> Tensor:
    """Attention of one token to those stored and itself, grouped-query, rotary, softmax in float32.

    The tokens are split among programs whose results a second launch combines (Flash-Decoding).
    """
    filler = position
    dim = max(triton.next_power_of_2(shape.head_dim), 16)
    shared = shape.heads // shape.kv_heads
    # Tensor cores where all are of one 16-bit type; else what the narrowest holds is kept exactly.
    precise = keys.dtype == torch.float32 or keys.dtype != x.dtype
    with launched_on(x.device):
        _attend[(shape.kv_heads, shape.parts)](
            *states, *(biases or (filler,) * 3), *(norms or (filler,) * 2),
            shape.cosines, shape.sines, position, keys, values,
            shape.sums, shape.peaks, shape.totals,
            shape.heads, shared, shape.capacity, shape.parts, shape.head_dim, shape.epsilon,
            shape.scale, HEADS=max(triton.next_power_of_2(shared), 16), DIM=dim, TILE=shape.tile,
            BIAS=biases is not None, NORM=norms is not None, PRECISE=precise, EARLY=early,
            num_warps=8 if precise or dim > 128 else 4, **_launch(early),
        )  # fmt: skip
        _combine[(shape.heads,)](
            shape.sums, shape.peaks, shape.totals, position, x, shape.heads, shape.parts,
            shape.head_dim, PARTS=triton.next_power_of_2(shape.parts), DIM=dim, TILE=shape.tile,
            EARLY=early, num_warps=4, **_launch(early),
        )  # fmt: skip
    return x


def overlaps(device: torch.device) -> bool:
    """Whether kernels there can start while the one before still runs."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _launch(early: bool) -> dict[str, Any]:
    return {"launch_pdl": True} if early else {}
