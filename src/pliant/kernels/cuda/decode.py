"""Decode: a few rows of x times a group code, straight from its stored bytes, in one launch.

Which codes the CUDA kernel takes, how it cuts the work, and the call. See decode.cu.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from pliant.codes import Code, GroupInt, GroupLevels, PowerScales, Sparse
from pliant.codes.packing import PLANES
from pliant.errors import PliantError

MOST_ROWS = 16  # of x in one launch
MOST_CODES = 3  # of one form, with one row of x
_STAGED = 16 << 10  # inputs of several rows of x from which they become digits once for all blocks
_SHARED = 226 << 10  # bytes of shared memory that a block may take on compute capability 9.0
_SHARED_AIM = 112 << 10  # so that the next launch's block fits beside this one's


class _Args(ctypes.Structure):
    _fields_ = [
        ("planes", ctypes.c_void_p * 3),
        ("scale_planes", ctypes.c_void_p * 3),
        ("zero_planes", ctypes.c_void_p * 3),
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("row_scale", "tables", "x", "y", "factor", "middle", "projection", "counters"),
                *("sparse_values", "sparse_columns", "sparse_starts", "staged"),
            )
        ),
        *(
            (name, ctypes.c_int32)
            for name in (
                *("out", "width", "groups", "group_size", "group_shift", "n", "y_stride"),
                *("scale_kind", "scale_bits", "scale_base"),
                *("table_count", "selector_bits", "row_tiles", "slab"),
                *("rank", "factor_bf16", "projection_bf16", "late"),
            )
        ),
        ("level_step", ctypes.c_float),
    ]


@dataclass(frozen=True)
class Shape:
    """How a launch cuts its work.

    warps: of a block, up to 16, or 8 where their registers allow no more. row_tiles: of 16 rows of
    W, of a block; its warps share out their chunks. depth: chunks that a warp has in flight, 4 or
    2. loads: of 16 bytes of a lane in a chunk, 1 or 2. slab: chunks of x in shared memory at once.
    0: as many as are good and fit.
    overlap: fetch weights while the kernel before still runs (programmatic dependent launch).
    """

    warps: int = 8
    row_tiles: int = 1
    depth: int = 0
    loads: int = 0
    slab: int = 0
    overlap: bool = True


@dataclass(frozen=True, eq=False)
class Terms:
    """What is added in the same launch: A (B x), and a sparse matrix.

    middle: B x, float32 [n, rank], which a kernel before has written or is writing; or, with B, its
    place: the launch's own first blocks write it, counted in two int32 that are zero between
    launches and that no other stream uses.
    """

    factor: Tensor | None = None  # A [out, rank], fp16 or bf16
    middle: Tensor | None = None
    values: Tensor | None = None  # fp16 [nnz], by row
    columns: Tensor | None = None  # int32 [nnz]
    starts: Tensor | None = None  # int32 [out + 1]
    late: bool = False  # `middle` alone comes from the kernel before; all else was there earlier
    b: Tensor | None = None  # B [rank, in], fp16 or bf16
    counters: Tensor | None = None


def vector_bytes(code: Code) -> int:
    """Bytes of a lane's load, 16, 8 or 4; 0 for a code that this kernel does not take.

    Rows must split into whole loads, and four loads' inputs must lie in one group.
    """
    if not isinstance(code, GroupInt | GroupLevels):
        return 0
    if isinstance(code, GroupLevels) and (code.bit_width > 4 or code.width % 8):
        return 0
    low = PLANES[code.bit_width][-1]
    if code.width * low % 64 or not code.shape[0]:
        return 0
    if any(p.numel() >= 2**32 for p in code.planes):  # the kernel's offsets are of 32 bits
        return 0
    row = code.width * low // 8
    for size in (16, 8, 4):
        unit = 4 * size
        whole = code.groups == 1 or code.group_size % unit == 0
        aligned = all(p.data_ptr() % size == 0 and p.is_contiguous() for p in code.planes)
        if row % unit == 0 and whole and aligned:
            return size
    return 0


def multiply(
    x: Tensor,  # [n, in] fp16 or bf16, contiguous, n up to MOST_ROWS
    code: GroupInt | GroupLevels,
    library: Any,
    stream: int,
    shape: Shape = Shape(),
    terms: Terms = Terms(),
    y: Tensor | None = None,  # [n, out], to write
) -> Tensor:
    """x times the transpose of `code` and of `terms`, [n, out] in x.dtype. `vector_bytes` > 0.

    library: `build.library` of the code's form and digits, with terms where there are any.
    """
    n, out = x.shape[0], code.shape[0]
    y = torch.empty(n, out, dtype=x.dtype, device=x.device) if y is None else y
    args = _product(x, code, y)
    if terms.factor is not None and terms.middle is not None:
        args.factor, args.middle = terms.factor.data_ptr(), terms.middle.data_ptr()
        args.rank, args.late = terms.factor.shape[1], terms.late
        args.factor_bf16 = terms.factor.dtype == torch.bfloat16
    if terms.b is not None and terms.counters is not None:
        args.projection, args.counters = terms.b.data_ptr(), terms.counters.data_ptr()
        args.projection_bf16 = terms.b.dtype == torch.bfloat16
    if terms.values is not None and terms.columns is not None and terms.starts is not None:
        args.sparse_values, args.sparse_columns = terms.values.data_ptr(), terms.columns.data_ptr()
        args.sparse_starts = terms.starts.data_ptr()
    tiles = 0 if n == 1 else next(t for t in (1, 2, 4) if n <= 4 * t)
    vec, loads, depth, warps = _cut(args, code, n, tiles, shape, library)
    many = n > 1 and x.numel() >= _STAGED and not terms.late
    held = _digits(args, vec, loads, shape.overlap, library, stream, x.device) if many else None
    status = library.pliant_decode(
        ctypes.byref(args), vec, loads, depth, tiles, warps, int(shape.overlap),
        ctypes.c_void_p(stream),
    )  # fmt: skip
    del held  # what takes its place comes later on this stream
    if status:
        raise PliantError(f"the decode kernel did not start (error {status})")
    return y


def multiply_each(
    x: Tensor,  # [1, in] fp16 or bf16, contiguous
    codes: Sequence[GroupInt | GroupLevels],  # up to MOST_CODES, of one `form`
    library: Any,
    stream: int,
    shape: Shape = Shape(),
) -> list[Tensor]:
    """x times the transpose of each code, in one launch: [1, out] of each, in x.dtype.

    library: `build.library` of the codes' form and digits, without terms.
    """
    products = [torch.empty(1, code.shape[0], dtype=x.dtype, device=x.device) for code in codes]
    args = (_Args * len(codes))(
        *(_product(x, code, y) for code, y in zip(codes, products, strict=True))
    )
    vec, loads, depth, warps = _cut(args[0], codes[0], 1, 0, shape, library)
    status = library.pliant_decode_each(
        args, len(codes), vec, loads, depth, warps, int(shape.overlap), ctypes.c_void_p(stream)
    )
    if status:
        raise PliantError(f"the decode kernel did not start (error {status})")
    return products


def form(code: GroupInt | GroupLevels) -> tuple[Any, ...]:
    """What codes share that one launch of `multiply_each` takes together."""
    scales = code.stored_scales
    base = scales.base if isinstance(scales, PowerScales) else None
    beside = code.zeros if isinstance(code, GroupInt) else code.selector
    tables = len(code.tables) if isinstance(code, GroupLevels) else 0
    return (
        *(type(code), code.bit_width, level_digits(code), code.width, code.group_size),
        *(type(scales), scales.bits, scales.row_scale is None, base, beside is None, tables),
        vector_bytes(code),
    )


def _product(x: Tensor, code: GroupInt | GroupLevels, y: Tensor) -> _Args:
    args = _Args.from_buffer_copy(_stored(code))
    args.x, args.y, args.n, args.y_stride = x.data_ptr(), y.data_ptr(), len(x), y.stride(0)
    if isinstance(code, GroupLevels):
        args.level_step = _level_step(code)  # NaN shows in a product of the wrong library
    return args


def _digits(
    args: _Args,
    vec: int,
    loads: int,
    overlap: bool,
    library: Any,
    stream: int,
    device: torch.device,
) -> Tensor:
    """x as the blocks' shared memory will hold it, made by a launch of its own."""
    where = (ctypes.byref(args), vec, loads)
    made = torch.empty(library.pliant_staged(*where), dtype=torch.uint8, device=device)
    args.staged = made.data_ptr()
    status = library.pliant_digits(*where, int(overlap), ctypes.c_void_p(stream))
    if status:
        raise PliantError(f"the digits kernel did not start (error {status})")
    return made


def _cut(
    args: _Args, code: GroupInt | GroupLevels, n: int, tiles: int, shape: Shape, library: Any
) -> tuple[int, int, int, int]:
    """(bytes of a lane's load, loads of a chunk, the ring's depth, warps); the rest is in args."""
    vec = vector_bytes(code)
    loads = _loads(code, vec, n, shape)
    shape = replace(shape, warps=min(shape.warps, library.pliant_warps(loads, tiles)))
    return vec, loads, _fit(args, code, vec, loads, shape, library), shape.warps


def expand(
    code: GroupInt | GroupLevels,
    half: bool,
    library: Any,
    stream: int,
    rows: slice = slice(None),  # of step 1
) -> Tensor:
    """Those rows of the matrix, [rows, in], fp16 (half) or bf16. `vector_bytes` at least 8.

    library: `build.library` of the code's form and of that dtype.
    """
    first, last, _ = rows.indices(code.shape[0])
    dtype = torch.float16 if half else torch.bfloat16
    matrix = torch.empty(max(last - first, 0), code.width, dtype=dtype, device=code.device)
    if matrix.numel():
        args = _Args.from_buffer_copy(_stored(code))
        args.y = matrix.data_ptr()
        status = library.pliant_expand(ctypes.byref(args), first, last, ctypes.c_void_p(stream))
        if status:
            raise PliantError(f"the decoding kernel did not start (error {status})")
    return matrix


def choose_shape(
    code: GroupInt | GroupLevels,
    n: int,
    library: Any = None,
    terms: Terms = Terms(),
    dtype: torch.dtype = torch.bfloat16,
    rows: int = 0,
) -> Shape:
    """How to cut the product with `n` rows of x in dtype: see tuning.py.

    library: `multiply`'s, with which it may be tuned on first use; None: it is not. rows: of all
    codes of a launch of `multiply_each`, where they are several.
    """
    from pliant.kernels.cuda import tuning  # which calls `multiply`

    return tuning.choose(code, n, library, terms, dtype, rows)


@cache
def _shared(device: torch.device) -> int:
    """Bytes of shared memory that a block may take."""
    if device.type != "cuda":
        return _SHARED
    about = torch.cuda.get_device_properties(device)
    return int(getattr(about, "shared_memory_per_block_optin", 99 << 10))


def project(x: Tensor, b: Tensor, library: Any, stream: int, overlap: bool = True) -> Tensor:
    """x [n, in] times the transpose of b [rank, in] (fp16 or bf16): float32 [n, rank].

    Rows of both must be whole 16-byte loads: `in` a multiple of 8.
    """
    middle = torch.empty(x.shape[0], b.shape[0], dtype=torch.float32, device=x.device)
    status = library.pliant_project(
        *(ctypes.c_void_p(t.data_ptr()) for t in (x, b, middle)),
        x.shape[0], x.shape[1], b.shape[0], int(b.dtype == torch.bfloat16), int(overlap),
        ctypes.c_void_p(stream),
    )  # fmt: skip
    if status:
        raise PliantError(f"the projection kernel did not start (error {status})")
    return middle


def _chunks(code: GroupInt | GroupLevels, vec: int, loads: int) -> int:
    """Of a row: what the four lanes of a quad load at once from the narrowest plane."""
    return code.width * PLANES[code.bit_width][-1] // 8 // (4 * vec * loads)


def _loads(code: GroupInt | GroupLevels, vec: int, n: int, shape: Shape) -> int:
    """Of a lane in a chunk: two where both lie in one group.

    Three segments of 16 bytes fill the ring with few chunks, which split less evenly: one there.
    """
    low = PLANES[code.bit_width][-1]
    unit, segments = 8 * vec, code.bit_width // low
    whole = code.groups == 1 or code.group_size % unit == 0
    if vec < 16 or not whole or code.width * low // 8 % unit:
        return 1
    if segments == 1:
        return shape.loads or 2
    return (shape.loads or 1) if segments == 3 and n == 1 else 1


def _fit(
    args: _Args, code: GroupInt | GroupLevels, vec: int, loads: int, shape: Shape, library: Any
) -> int:
    """The ring's depth; and in args, how much of x is in shared memory at once: all, if it fits."""
    chunks = _chunks(code, vec, loads)
    segments = code.bit_width // PLANES[code.bit_width][-1]
    depths = [4, 2] if vec == 16 and segments <= 3 else [4] if vec < 16 else [2]
    if loads == 2 and segments > 1:
        depths = [2]
    if shape.depth in depths:
        depths = [shape.depth]
    args.slab = min(shape.slab or chunks, chunks)
    args.row_tiles = shape.row_tiles

    def fits(depth: int, limit: int) -> bool:
        size = library.pliant_shared(ctypes.byref(args), vec, loads, depth, shape.warps)
        return int(size) <= limit

    most = _shared(code.device)
    for limit in (min(_SHARED_AIM, most), most):
        for depth in depths:
            if fits(depth, limit):
                return depth
    depth = depths[-1]
    least = -(-args.slab // 4)
    while not fits(depth, most) and args.slab > least:
        args.slab = max(-(-args.slab // 2), least)
    while not fits(depth, most) and args.row_tiles > 1:
        args.row_tiles = -(-args.row_tiles // 2)
    while not fits(depth, most) and args.slab > 1:
        args.slab = -(-args.slab // 2)
    return depth


_LEVEL_STEPS: WeakKeyDictionary[Code, float] = WeakKeyDictionary()


def level_digits(code: GroupInt | GroupLevels) -> int:
    """8-bit digits that the kernel makes of a level: 1 or 2; 0 for integers.

    Seen from the tables on first use, for which a GPU is waited for. A stream that is being
    captured cannot be: two digits, which hold for any table, unless the answer is known.
    """
    if isinstance(code, GroupInt):
        return 0
    return 1 if _level_step(code) > 0 else 2


def _level_step(code: GroupLevels) -> float:
    """What all levels are 8-bit integers of, a power of two; NaN where there is no such step."""
    step = _LEVEL_STEPS.get(code)
    if step is None:
        if code.tables.is_cuda and torch.cuda.is_current_stream_capturing():
            return float("nan")
        step = _LEVEL_STEPS[code] = integer_step(code.tables)
    return step


def integer_step(tables: Tensor) -> float:
    """The power of two that levels [tables, levels] fp16 are integers of, at most 127 of it.

    Besides, what the kernel's halves of 16 levels ask for: within each half no two levels are
    more than 127 steps apart, and none of the lower half is above any of the upper one. NaN for
    tables that have no such step.
    """
    nowhere = float("nan")
    levels = tables.cpu().double()
    if not levels.isfinite().all():
        return nowhere
    whole = (levels * 2**24).long()  # fp16 has no smaller unit
    bits = 0
    for value in whole.flatten().tolist():
        bits |= value
    step = bits & -bits or 1
    whole = whole // step
    if int(whole.abs().max()) > 127:
        return nowhere
    if whole.shape[1] == 16:
        lower, upper = whole[:, :8], whole[:, 8:]
        apart = max(int((half.amax(1) - half.amin(1)).max()) for half in (lower, upper))
        if apart > 127 or bool((lower.amax(1) > upper.amin(1)).any()):
            return nowhere
    return step * 2.0**-24


_STORED: WeakKeyDictionary[Code, _Args] = WeakKeyDictionary()


def _stored(code: GroupInt | GroupLevels) -> _Args:
    """What a launch says of the code itself."""
    args = _STORED.get(code)
    if args is not None:
        return args
    args = _Args()
    _point(args.planes, code.planes)
    scales = code.stored_scales
    _point(args.scale_planes, scales.planes)
    args.row_scale = None if scales.row_scale is None else scales.row_scale.data_ptr()
    args.scale_bits = scales.bits
    if isinstance(scales, PowerScales):
        args.scale_kind, args.scale_base = 2, scales.base
    else:
        args.scale_kind = 0 if scales.row_scale is None else 1
    args.out, args.width = code.shape
    args.groups, args.group_size = code.groups, code.group_size
    size = code.group_size
    args.group_shift = size.bit_length() - 1 if size & (size - 1) == 0 else -1
    if isinstance(code, GroupInt):
        _point(args.zero_planes, code.zeros or ())
    else:
        _point(args.zero_planes, code.selector or ())
        args.tables, args.table_count = code.tables.data_ptr(), len(code.tables)
        args.selector_bits = (len(code.tables) - 1).bit_length()
    _STORED[code] = args
    return args


def _point(pointers: Any, planes: tuple[Tensor, ...]) -> None:
    for i, plane in enumerate(planes):
        pointers[i] = plane.data_ptr()


def sparse_terms(code: Sparse) -> tuple[Tensor, Tensor, Tensor]:
    """(values, columns int32, starts int32 [out + 1]): 4 bytes a row and up to 3 a value more."""
    row, column = code.coordinates()
    starts = torch.zeros(code.shape[0] + 1, dtype=torch.int32, device=code.device)
    counts = torch.bincount(row, minlength=code.shape[0])
    starts[1:] = counts.cumsum(0)
    return code.values, column.to(torch.int32).contiguous(), starts
