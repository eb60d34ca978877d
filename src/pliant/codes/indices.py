"""Index tensors in the smallest integer type that holds them."""

from __future__ import annotations

import torch
from torch import Tensor

from pliant.errors import CorruptError

INDEX_TYPES = (torch.uint8, torch.uint16, torch.int32)


def index_type(bound: int) -> torch.dtype:
    """The smallest stored type for integers 0 .. bound - 1."""
    if bound <= 2**8:
        return torch.uint8
    return torch.uint16 if bound <= 2**16 else torch.int32


def compact(index: Tensor, bound: int) -> Tensor:
    return index.to(index_type(bound))


def check_range(index: Tensor, bound: int, what: str) -> None:
    """CorruptError unless every stored index is in 0 .. bound - 1."""
    if index.numel():
        wide = index.to(torch.int64)
        if int(wide.min()) < 0 or int(wide.max()) >= bound:
            raise CorruptError(f"{what} holds an index outside 0..{bound - 1}")
