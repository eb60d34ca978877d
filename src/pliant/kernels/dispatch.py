"""`matmul` and the table of kernels by code and device."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from pliant.codes import Code
from pliant.errors import PliantError
from pliant.kernels.activations import rounded

Kernel = Callable[[Tensor, Code], Tensor]

_KERNELS: dict[tuple[type[Code], str | None], Kernel] = {}


def register(code_type: type[Code], device_type: str | None = None) -> Callable[[Kernel], Kernel]:
    """Make a function the kernel of `code_type` on "cpu", "cuda", ..., or on any device (None).

    A kernel gets x [n, in] and the code and returns [n, out] in x.dtype. The one of `Code` on any
    device is the fallback.
    """

    def record(kernel: Kernel) -> Kernel:
        _KERNELS[code_type, device_type] = kernel
        return kernel

    return record


def matmul(x: Tensor, code: Code) -> Tensor:
    """x [..., in] times the transpose of `code` [out, in]: [..., out] in x.dtype."""
    out, width = code.shape
    if x.shape[-1] != width:
        raise PliantError(f"x has {x.shape[-1]} features; a code of {out} x {width} takes {width}")
    flat = x.reshape(math.prod(x.shape[:-1]), width)
    if not flat.shape[0]:
        return x.new_empty(*x.shape[:-1], out)
    flat = rounded(flat, code)
    for key in ((type(code), x.device.type), (type(code), None), (Code, None)):
        if key in _KERNELS:
            return _KERNELS[key](flat, code).reshape(*x.shape[:-1], out)
    raise PliantError(f"no kernel multiplies a {type(code).__name__}")
