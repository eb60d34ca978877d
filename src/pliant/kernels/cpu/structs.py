"""Codes as native/matrix.h describes them: every pointer checked against the sizes beside it.

A description holds addresses and no tensor: it is good for as long as its code is alive.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from pliant.codes import Code, Dense, GroupInt, GroupLevels, PowerScales, RowStack
from pliant.codes.group_int import GroupScales
from pliant.codes.packing import PLANES, plane_bytes

_WIDEST = 2**31 - 1  # columns of a row
_DENSE = {torch.float32: 2, torch.bfloat16: 3, torch.float16: 4}


class Integers(ctypes.Structure):
    _fields_ = [
        ("plane", ctypes.c_void_p * 3),
        ("columns", ctypes.c_int64),
        ("bits", ctypes.c_int64),
    ]


class Matrix(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("dense", ctypes.c_void_p),
        ("q", Integers),
        ("half_scales", ctypes.c_void_p),
        ("packed_scales", Integers),
        ("row_scales", ctypes.c_void_p),
        ("power_base", ctypes.c_int64),
        ("zeros", Integers),
        ("tables", ctypes.c_void_p),
        ("table_count", ctypes.c_int64),
        ("selector", Integers),
    ]


class Linear(ctypes.Structure):
    _fields_ = [
        ("parts", ctypes.POINTER(Matrix)),
        ("count", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("bias", ctypes.c_void_p),
    ]


_PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
_NORMS = ("attention_norm", "mlp_norm", "query_norm", "key_norm")


class Layer(ctypes.Structure):
    _fields_ = [
        *((name, Linear) for name in _PROJECTIONS),
        *((name, ctypes.c_void_p) for name in _NORMS),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
    ]


class Step(ctypes.Structure):
    _fields_ = [
        ("layers", ctypes.POINTER(Layer)),
        ("layer_count", ctypes.c_int64),
        ("hidden", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("inner", ctypes.c_int64),
        ("capacity", ctypes.c_int64),
        ("embedding", Linear),
        ("head", Linear),
        ("final_norm", ctypes.c_void_p),
        ("inverse_frequencies", ctypes.c_void_p),
        ("epsilon", ctypes.c_float),
        ("rope_scale", ctypes.c_float),
        ("score_scale", ctypes.c_float),
        ("activations", ctypes.c_int32),
        ("shared", ctypes.c_void_p),
        ("counters", ctypes.c_void_p),
    ]


class Row(ctypes.Structure):
    _fields_ = [
        ("pages", ctypes.c_void_p),
        ("token", ctypes.c_int64),
        ("position", ctypes.c_int64),
    ]


SIZES = [ctypes.sizeof(struct) for struct in (Integers, Matrix, Linear, Layer, Step)]


class Unsuited(Exception):
    """The native kernels do not know this code, or its tensors are not laid out for them."""


_KNOWN: WeakKeyDictionary[Code, Linear] = WeakKeyDictionary()


def describe(code: Code) -> Linear:
    """`code` for the native kernels; Unsuited when they have none for it."""
    known = _KNOWN.get(code)
    if known is None:
        known = _KNOWN[code] = linear(code)
    return known


def linear(code: Code, bias: Tensor | None = None) -> Linear:
    """A code, or a stack of them, and the bias [out] of its layer."""
    parts = [_matrix(part) for part in _leaves(code)]
    out, width = code.shape
    if not 0 < width <= _WIDEST:
        raise Unsuited(f"rows of {width}")
    made = Linear((Matrix * len(parts))(*parts), len(parts), out, width)
    if bias is not None:
        made.bias = address(bias, (out,), torch.float32)
    return made


def address(tensor: Tensor, shape: tuple[int, ...], *dtypes: torch.dtype) -> int:
    """Where a tensor's values lie; Unsuited unless it is a plain one of this shape and dtype."""
    if tensor.device.type != "cpu" or tensor.dtype not in dtypes:
        raise Unsuited(f"{tensor.dtype} on {tensor.device}")
    if tuple(tensor.shape) != shape or not tensor.is_contiguous():
        raise Unsuited(f"{tuple(tensor.shape)} where {shape}, contiguous, is expected")
    return tensor.data_ptr()


def _leaves(code: Code) -> list[Code]:
    if isinstance(code, RowStack):
        return [leaf for part in code.parts for leaf in _leaves(part)]
    return [code]


def _matrix(code: Code) -> Matrix:
    out, width = code.shape
    made = Matrix(rows=out, width=width, power_base=-1)
    if type(code) is Dense:
        made.kind = _DENSE[code.values.dtype]
        made.dense = address(code.values, (out, width), code.values.dtype)
        return made
    if type(code) is not GroupInt and type(code) is not GroupLevels:
        raise Unsuited(type(code).__name__)
    size, groups = code.group_size, code.groups
    if not 1 <= size <= _WIDEST or code.bit_width not in PLANES:
        raise Unsuited(f"groups of {size} at {code.bit_width} bits")
    made.group, made.groups = size, groups
    made.q = _integers(code.planes, code.bit_width, out, width)
    _scales(made, code.stored_scales, out, groups)
    if isinstance(code, GroupInt):
        made.kind = 0
        if code.zeros is not None:
            made.zeros = _integers(code.zeros, code.bit_width, out, groups)
        return made
    made.kind = 1
    made.table_count = len(code.tables)
    made.tables = address(code.tables, (len(code.tables), 2**code.bit_width), torch.float16)
    if code.selector is not None:
        made.selector = _integers(code.selector, (made.table_count - 1).bit_length(), out, groups)
    return made


def _scales(made: Matrix, scales: GroupScales | PowerScales, out: int, groups: int) -> None:
    if scales.groups != groups:
        raise Unsuited(f"{scales.groups} scales a row where {groups} are expected")
    if scales.row_scale is not None:
        made.row_scales = address(scales.row_scale, (out,), torch.float16)
    if isinstance(scales, PowerScales):
        made.power_base = scales.base
    elif scales.row_scale is None:
        made.half_scales = address(scales.planes[0], (out, groups), torch.float16)
        return
    made.packed_scales = _integers(scales.planes, scales.bits, out, groups)


def _integers(planes: Sequence[Tensor], bits: int, out: int, columns: int) -> Integers:
    made = Integers(columns=columns, bits=bits)
    if len(planes) != len(PLANES[bits]):
        raise Unsuited(f"{len(planes)} planes for {bits} bits")
    for i, (plane, wide) in enumerate(zip(planes, PLANES[bits], strict=True)):
        made.plane[i] = address(plane, (out, plane_bytes(columns, wide)), torch.uint8)
    return made
