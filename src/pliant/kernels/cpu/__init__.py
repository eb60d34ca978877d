"""Native kernels of the CPU: products straight from the stored planes, in threads that stay.

Up to 16 activations meet group integers as integers of 16 bits (in two bytes) with a scale for
every 32 of them, which errs by less than the weights' own float16 scales do; with AVX-512 so do
they meet group levels of up to 4 bits, whose levels are rounded to 16 bits too. More than 16, with
AVX2, meet group codes in products of 16 bits: as integers of 15 bits, with a scale for every 32.
PLIANT_NATIVE=exact keeps float32 instead, and PLIANT_NATIVE=int8 takes 8 bits for up to 16 inside
`integer_activations`. What the kernels do not cover, and all of it where there is no compiler, runs
in plain torch.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pliant.codes import Code, Dense, GroupInt, GroupLevels
from pliant.kernels import reference
from pliant.kernels.cpu.build import library
from pliant.kernels.cpu.structs import Linear, Unsuited, describe
from pliant.kernels.dispatch import Kernel, register

MOST = 16  # inputs that are multiplied without decoding a tile
PIECE = 256  # inputs that meet a weight at a time
TILE = 2**20  # bytes of a decoded tile

_EIGHT_BITS: ContextVar[bool] = ContextVar("eight_bits", default=False)


@contextmanager
def integer_activations() -> Iterator[None]:
    """Inside, few activations meet group codes in 8 bits, if PLIANT_NATIVE=int8 asks for it.

    It adds 0.2% (below 3 bits a weight) to 13% (at 5.5) to the damage of a balanced artifact of
    SmolLM2, so it is never on by itself.
    """
    token = _EIGHT_BITS.set(True)
    try:
        yield
    finally:
        _EIGHT_BITS.reset(token)


def activation_bits(eight: bool) -> int:
    """Bits of an activation in a native product; `eight` where 8 may be asked for."""
    asked = os.environ.get("PLIANT_NATIVE")
    return 32 if asked == "exact" else 8 if asked == "int8" and eight else 16


def _kernel(fallback: Kernel) -> Kernel:
    """A kernel of the native library, and `fallback` for what it does not cover."""

    def product(x: Tensor, code: Code) -> Tensor:
        native, linear = library(), None
        if native is not None and not _traced(x):
            linear = _described(code)
        if native is None or linear is None:
            return fallback(x, code)
        if x.shape[0] <= MOST:
            return _few(native, x, linear)
        return _many(native, x, linear)

    return product


group_int = register(GroupInt, "cpu")(_kernel(reference.group_int))
group_levels = register(GroupLevels, "cpu")(_kernel(reference.by_row_tiles))


@register(Dense, "cpu")
def dense(x: Tensor, code: Code) -> Tensor:
    """Values of another dtype than x's are widened in registers."""
    assert isinstance(code, Dense)
    same = code.values.dtype == x.dtype
    return reference.dense(x, code) if same else _other_dense(x, code)


_other_dense = _kernel(reference.dense)


def _traced(x: Tensor) -> bool:
    """Whether torch must see every operation on x, or changes it."""
    return (x.requires_grad and torch.is_grad_enabled()) or torch.is_autocast_enabled("cpu")


def _described(code: Code) -> Linear | None:
    try:
        return describe(code)
    except Unsuited:
        return None


def _few(native: ctypes.CDLL, x: Tensor, linear: Linear) -> Tensor:
    given = x.detach().float().contiguous()
    y = torch.empty(x.shape[0], linear.rows)
    done = native.pliant_matmul(
        ctypes.byref(linear), given.data_ptr(), y.data_ptr(), x.shape[0],
        activation_bits(_EIGHT_BITS.get()), torch.get_num_threads(),
    )  # fmt: skip
    if not done:
        raise MemoryError("the system gives no more threads")
    return y.to(x.dtype)


def _many(native: ctypes.CDLL, x: Tensor, linear: Linear) -> Tensor:
    product = _words if multiplies_words() else _tiles
    return product(native, x, linear)


def _words(native: ctypes.CDLL, x: Tensor, linear: Linear) -> Tensor:
    y = torch.empty(x.shape[0], linear.rows)
    for start in range(0, x.shape[0], PIECE):
        given = x[start : start + PIECE].detach().float().contiguous()
        n = len(given)
        operand = aligned(native.pliant_gemm_bytes(n, linear.width))
        to = y[start:].data_ptr()
        if not native.pliant_gemm(
            ctypes.byref(linear), given.data_ptr(), to, n, operand.data_ptr(),
            torch.get_num_threads(),
        ):  # fmt: skip
            raise MemoryError("the system gives no more threads")
    return y.to(x.dtype)


def multiplies_words() -> bool:
    """Whether many inputs are multiplied in 16 bits: not where torch is faster, or told not to."""
    native = library()
    wanted = os.environ.get("PLIANT_NATIVE") != "exact"
    return wanted and native is not None and bool(native.pliant_words())


def aligned(nbytes: int) -> Tensor:
    """That many bytes, the first of them at a multiple of 64."""
    room = torch.empty(nbytes + 63, dtype=torch.uint8)
    return room[-room.data_ptr() % 64 :]


def _tiles(native: ctypes.CDLL, x: Tensor, linear: Linear) -> Tensor:
    y = x.new_empty(x.shape[0], linear.rows)
    step = max(1, min(linear.rows, TILE // (4 * linear.width)))
    room = torch.empty(step, linear.width)
    for start in range(0, linear.rows, step):
        stop = min(start + step, linear.rows)
        native.pliant_decode(
            ctypes.byref(linear), start, stop, room.data_ptr(), torch.get_num_threads()
        )
        y[:, start:stop] = F.linear(x, room[: stop - start].to(x.dtype))
    return y
