"""Whole matrices from codes, for what reads weights and does not multiply with them."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from pliant.codes import Code, GroupInt, GroupLevels


def decode(code: Code, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix [out, in], as `code.decode` gives it; group codes on a GPU in one launch."""
    if isinstance(code, GroupInt | GroupLevels) and code.device.type == "cuda" and _triton():
        from pliant.kernels.triton import group

        return group.decode(code, dtype)
    return code.decode(dtype)


@cache
def _triton() -> bool:
    return find_spec("triton") is not None
