"""Dense: the matrix itself, in 16 or 32 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pliant.codes.base import Code, Stored, form
from pliant.errors import PliantError

_TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@form("dense")
@dataclass(frozen=True, eq=False)
class Dense(Code):
    """Values as they are; `dtype` is one of bfloat16, float16, float32."""

    values: Tensor  # [out, in]

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or self.values.dtype not in _TYPES.values():
            raise PliantError(
                f"a dense code is a matrix of {', '.join(_TYPES)}, "
                f"not {self.values.dtype} {tuple(self.values.shape)}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    def rows(self, index: slice | Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        if isinstance(index, slice):
            return self.values[index].to(dtype, copy=True)
        # The gradient of an embedding is gathered much faster than that of an index.
        return F.embedding(index, self.values).to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        return {"values": self.values}

    def meta(self) -> dict[str, Any]:
        dtype = str(self.values.dtype).removeprefix("torch.")
        return {"code": self.name, "shape": list(self.shape), "dtype": dtype}

    @classmethod
    def build(cls, stored: Stored) -> Dense:
        dtype = stored.choice("dtype", _TYPES)
        return cls(stored.tensor("values", stored.shape(), dtype))
