"""Scaled: a code times fp16 factors of its outputs and its inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pliant.codes.base import Code, Stored, form, prefixed
from pliant.errors import PliantError


@form("scaled")
@dataclass(frozen=True, eq=False)
class Scaled(Code):
    """W = diag(out_scale) inner diag(in_scale); either factor may be absent."""

    inner: Code
    out_scale: Tensor | None = None  # fp16 [out]
    in_scale: Tensor | None = None  # fp16 [in]

    def __post_init__(self) -> None:
        for what, scale, size in (
            ("out_scale", self.out_scale, self.inner.shape[0]),
            ("in_scale", self.in_scale, self.inner.shape[1]),
        ):
            if scale is not None and (scale.dtype != torch.float16 or scale.shape != (size,)):
                raise PliantError(
                    f"{what} must be float16 [{size}], not {scale.dtype} {list(scale.shape)}"
                )

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    def rows(self, index: slice | Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        values = self.inner.rows(index)
        if self.out_scale is not None:
            values = values * self.out_scale[index].float()[:, None]
        if self.in_scale is not None:
            values = values * self.in_scale.float()
        return values.to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        flat = prefixed("inner", self.inner)
        if self.out_scale is not None:
            flat["out_scale"] = self.out_scale
        if self.in_scale is not None:
            flat["in_scale"] = self.in_scale
        return flat

    def meta(self) -> dict[str, Any]:
        return {
            "code": self.name,
            "inner": self.inner.meta(),
            "out_scale": self.out_scale is not None,
            "in_scale": self.in_scale is not None,
        }

    @classmethod
    def build(cls, stored: Stored) -> Scaled:
        inner = stored.code("inner")
        out, width = inner.shape

        def scale(key: str, size: int) -> Tensor | None:
            return stored.tensor(key, (size,), torch.float16) if stored.flag(key) else None

        return cls(inner, scale("out_scale", out), scale("in_scale", width))
