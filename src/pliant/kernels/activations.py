"""Activations rounded to few bits before they meet a quantized weight, to measure what that does.

The rounding sits where an integer kernel would have it: at the input of the stored form, so after
the rotation, permutation or scaling of a composed code. What a code keeps in 16 bits (dense parts,
sparse values, low-rank factors) multiplies activations in 16 bits too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from pliant.codes import Code, Dense, Sparse
from pliant.errors import PliantError

Rounding = Callable[[Tensor], Tensor]
_E4M3_TOP = 448.0
_ACTIVE: ContextVar[Rounding | None] = ContextVar("rounding", default=None)


def fake_quantize_activations(
    x: Tensor,  # [..., in]
    bits: int = 8,
    group_size: int = 0,
    *,
    floating: bool = False,
    clip: float = 1.0,
) -> Tensor:
    """x rounded to symmetric integers of `bits` bits, or to fp8 e4m3, and back, in its dtype.

    One scale for each `group_size` channels of each token: 0 is one a token (LLM.int8()'s
    vector-wise scales), -1 one for all of x. `clip` is the share of the largest |x| that is
    representable. Sources: LLM.int8(); ZeroQuant-FP (floating=True); DuQuant (bits=4, clip=0.9).
    """
    if not floating and not 2 <= bits <= 16:
        raise PliantError(f"activations take 2 to 16 bits, not {bits}")
    if floating and bits != 8:
        raise PliantError(f"floating activations are fp8 e4m3: 8 bits, not {bits}")
    if not 0 < clip <= 1:
        raise PliantError(f"clip is a share above 0 and up to 1, not {clip}")
    width = x.shape[-1]
    size = width if group_size <= 0 else min(group_size, width)
    groups = pad(x.float(), (0, -width % size))
    groups = groups.view(*x.shape[:-1], groups.shape[-1] // size, size)
    peak = groups.abs().amax(-1, keepdim=True) if group_size >= 0 else groups.abs().amax()
    top = _E4M3_TOP if floating else float(2 ** (bits - 1) - 1)
    scale = (peak * (clip / top)).clamp_min(1e-30)
    steps = (groups / scale).clamp_(-top, top)
    steps = steps.to(torch.float8_e4m3fn).float() if floating else steps.round_()
    whole: Tensor = (steps * scale).flatten(-2)
    return whole[..., :width].to(x.dtype)


@contextmanager
def rounded_activations(rounding: Rounding) -> Iterator[None]:
    """Inside, `kernels.matmul` applies `rounding` to what each quantized form multiplies.

    Holds for every code of a coded model: `with rounded_activations(lambda x:
    fake_quantize_activations(x, 4)): model(ids)`. Contexts do not nest; the inner one counts.
    """
    token = _ACTIVE.set(rounding)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def rounding_is_on() -> bool:
    """Whether the code runs inside `rounded_activations`."""
    return _ACTIVE.get() is not None


def rounded(x: Tensor, code: Code) -> Tensor:
    """x as `code` is to meet it: rounded if a rounding is on and the code is a quantized leaf."""
    rounding = _ACTIVE.get()
    if rounding is None or isinstance(code, Dense | Sparse) or _composed(code):
        return x
    return rounding(x)


def _composed(code: Code) -> bool:
    """Whether the code is made of codes, each of which `matmul` will meet in turn."""
    parts = vars(code).values()
    return any(
        isinstance(part, Code)
        or (isinstance(part, tuple) and any(isinstance(p, Code) for p in part))
        for part in parts
    )
