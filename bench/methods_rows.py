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
        "Rounding",
        ("rtn", {"bits": 3, "clip": False}),
        ("rtn", {"bits": 3}),
        ("rtn", {"bits": 4, "clip": False}),
        ("rtn", {"bits": 4}),
    ),
    *_rows(
        "Number formats",
        ("kbit", {"bits": 4, "data_type": "int"}),
        ("kbit", {"bits": 4, "data_type": "float"}),
        ("kbit", {"bits": 4, "data_type": "quantile"}),
        ("kbit", {"bits": 4, "data_type": "dynamic"}),
        ("kbit", {"bits": 3, "data_type": "quantile"}),
        ("kbit_gptq", {"bits": 3, "data_type": "quantile"}),
        ("minifloat", {"bits": 4, "scale_bits": 6}),
        ("minifloat_gptq", {"bits": 4, "scale_bits": 6}),
        ("minifloat_gptq", {"bits": 3, "scale_bits": 6}),
        ("block_float", {"bits": 6}),
        ("block_float", {"bits": 4}),
        ("block_float", {"bits": 4, "element": "minifloat"}),
        ("block_float_gptq", {"bits": 4}),
        ("block_float_reordered", {"bits": 4}),
        ("block_float_reordered_gptq", {"bits": 4}),
        ("bitmod", {"bits": 3, "clip": False}),
        ("bitmod", {"bits": 3}),
        ("bitmod_gptq", {"bits": 3}),
        ("bitmod_gptq", {"bits": 3, "group_size": 64, "scale_bits": 6}),
        ("bitmod_gptq", {"bits": 4, "group_size": 64, "scale_bits": 6}),
        ("zeroquant_fp", {"constraint": "none"}),
        ("zeroquant_fp", {"constraint": "ratio"}),
        ("zeroquant_fp", {"constraint": "power"}),
        ("zeroquant_fp_rtn", {"constraint": "ratio"}),
    ),
    *_rows(
        "Codebooks and outliers",
        ("squeezellm", {"bits": 3, "outliers": 0.0, "sensitive": 0.0}),
        ("squeezellm", {"bits": 3}),
        ("rtn", {"bits": 4, "group_size": 256, "clip": False}),
        ("rtn", {"bits": 4, "group_size": 256}),
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
        ("lorc", {"base": "zeroquant_fp", "rank": 16}),
        ("eora", {"base": "zeroquant_fp", "rank": 16}),
        ("eora", {"base": "squeezellm", "bits": 3, "rank": 16}),
        ("eora", {"base": "bitmod_gptq", "bits": 3, "rank": 16, "group_size": 64, "scale_bits": 6}),
    ),
    *_rows(
        "Two bits and below",
        ("rtn", {"bits": 2, "group_size": 32, "scale_bits": 6}),
        ("binary_operators", {"operator": "tensor"}),
        ("binary_operators", {"operator": "channel"}),
        ("binary_operators", {"operator": "group", "scale_bits": 6}),
        ("binary_operators", {"operator": "residual", "scale_bits": 6}),
        ("binary_operators", {"operator": "channel", "feedback": True}),
        ("binary_operators", {"operator": "residual", "scale_bits": 6, "feedback": True}),
        ("binary", {"levels": "max"}),
        ("binary", {}),
        ("binary", {"levels": "optimal", "feedback": True, "scale_bits": 6}),
        ("ternary", {"levels": "max"}),
        ("ternary", {}),
        ("ternary", {"levels": "optimal", "feedback": True, "scale_bits": 6}),
        ("ternary", {"levels": "optimal", "feedback": True, "group_size": 16, "scale_bits": 6}),
        ("bitstack", {"blocks": 1, "rank": 2}),
        ("bitstack", {"blocks": 2, "rank": 2}),
        ("bitstack", {"blocks": 3, "rank": 2}),
        ("littlebit", {"bits": 1.0, "rounds": 0, "rotations": 0, "residual": False}),
        ("littlebit", {"bits": 1.0, "rounds": 0, "rotations": 0}),
        ("littlebit", {"bits": 0.5}),
        ("littlebit", {"bits": 1.0}),
    ),
)
