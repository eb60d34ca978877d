"""`matmul` and the table of kernels by code and device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from pliant.codes import Code
from pliant.errors import PliantError
from pliant.kernels.activations import rounded

Kernel = Callable[[Tensor, Code], Tensor]
Together = Callable[[Tensor, Sequence[Code]], list[Tensor | None]]

_KERNELS: dict[tuple[type[Code], str | None], Kernel] = {}
_TOGETHER: dict[str, Together] = {}


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


def register_together(device_type: str) -> Callable[[Together], Together]:
    """Make a function the one that multiplies several codes at once on "cuda", ...

    It gets x [n, in] and the codes, and returns [n, out] in x.dtype for each that it took, None for
    the others.
    """

    def record(together: Together) -> Together:
        _TOGETHER[device_type] = together
        return together

    return record


def matmul_each(x: Tensor, codes: Sequence[Code]) -> list[Tensor]:
    """`matmul` of x [n, in] with each of the codes, in fewer launches where a device can."""
    found: list[Tensor | None] = [None] * len(codes)
    alike = all(code.shape[1] == x.shape[-1] and rounded(x, code) is x for code in codes)
    if len(codes) > 1 and len(x) and alike and x.device.type in _TOGETHER:
        found = _TOGETHER[x.device.type](x, codes)
    return [matmul(x, code) if y is None else y for y, code in zip(found, codes, strict=True)]
