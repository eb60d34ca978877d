"""Which methods bench/methods.py measures, with which options."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any


def _exact(targets: Any, model: Any) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(frozen=True)
class Row:
    """One method with its options; activations: what rounds the inputs of every multiply."""

    section: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    activations: Callable[[Any, Any], AbstractContextManager[None]] = _exact

    @property
    def label(self) -> str:
        return f"{self.method}, {self.note}" if self.note else self.method

    @property
    def asked(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in self.options.items())

    @property
    def key(self) -> str:
        return f"{self.label}({self.asked})"


def _rows(section: str, *rows: tuple[str, dict[str, Any]]) -> tuple[Row, ...]:
    return tuple(Row(section, name, options) for name, options in rows)


_SIZES = ((1, 64), (1, 32), (2, 64), (2, 32), (3, 64), (3, 32), (4, 64), (4, 32), (5, 64), (6, 64),
          (8, 64))  # fmt: skip

CURVE = tuple(
    Row(
        "GPTQ, the curve that the others are held against",
        "gptq",
        {"bits": bits, "group_size": group, "scale_bits": 6 if bits < 5 else 8},
    )
    for bits, group in _SIZES
)

ROWS: tuple[Row, ...] = (
    *_rows(
        "Rounding and calibrated integers",
        ("rtn", {"bits": 3, "clip": False}),
        ("rtn", {"bits": 3}),
        ("rtn", {"bits": 4}),
        ("gptq", {"bits": 3}),
    ),
    *_rows(
        "Codebooks and outliers",
        ("squeezellm", {"bits": 3, "outliers": 0.0, "sensitive": 0.0}),
        ("squeezellm", {"bits": 3}),
        ("rtn", {"bits": 4, "group_size": 256, "clip": False}),
        ("super_weight", {"bits": 4, "group_size": 256}),
        ("rtn", {"bits": 8, "group_size": 0, "symmetric": True, "clip": False}),
        ("llm_int8", {}),
    ),
    *_rows(
        "Compensation by a low-rank term",
        ("lorc", {"base": "rtn", "bits": 3, "rank": 16}),
        ("eora", {"base": "rtn", "bits": 3, "rank": 16}),
        ("lorc", {"base": "gptq", "bits": 3, "rank": 16}),
        ("eora", {"base": "gptq", "bits": 3, "rank": 16}),
    ),
)
