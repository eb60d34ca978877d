"""Budgets and sizes: how much memory a running model may hold, and for whom."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pliant.errors import BudgetError

_UNITS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip


def parse_size(text: str | int) -> int:
    """Bytes in `text`: "128MiB", "1.5 GiB", "300MB" (decimal), "512" (bytes) or an int.

    Raises BudgetError when the text is no size or not positive.
    """
    if isinstance(text, int):
        size = text
    else:
        found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", text)
        if found is None or found[2].lower() not in _UNITS:
            raise BudgetError(f"{text!r} is not a size; write for example 128MiB, 1.5GiB or 300MB")
        size = int(float(found[1]) * _UNITS[found[2].lower()])
    if size <= 0:
        raise BudgetError(f"a size must be positive, not {text!r}")
    return size


def format_size(size: float) -> str:
    """`size` bytes in the binary unit a person would choose: 1.50 GiB, 128.0 MiB, 12 B."""
    sign, size = ("-" if size < 0 else ""), abs(size)
    if size >= 2**30:
        return f"{sign}{size / 2**30:.2f} GiB"
    if size >= 2**20:
        return f"{sign}{size / 2**20:.1f} MiB"
    if size >= 2**10:
        return f"{sign}{size / 2**10:.1f} KiB"
    return f"{sign}{size:.0f} B"


@dataclass(frozen=True)
class Budget:
    """What the running model may hold.

    memory: bytes in total (weights, embeddings, KV cache, activations at their peak).
    context: tokens a sequence may reach. batch: sequences that run at once.
    """

    memory: int
    context: int = 2048
    batch: int = 1

    def __post_init__(self) -> None:
        if self.context < 1 or self.batch < 1:
            raise BudgetError(
                f"context and batch must be at least 1, not {self.context} and {self.batch}"
            )
        if self.memory < 1:
            raise BudgetError("a memory budget must be positive")
