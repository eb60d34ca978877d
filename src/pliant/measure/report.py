"""The report of an artifact: one page that needs no network, and pictures.

Its input is plain data, so that anything that has a climb and an allocation can be shown.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pliant.budget import format_size
from pliant.errors import PliantError

PARTS = ("weights", "embeddings", "kv_cache", "activations", "free")
PART_NAMES = dict(zip(PARTS, ("Weights", "Embeddings", "KV cache", "Activations", "Free"),
                      strict=True))  # fmt: skip
_ROLE_ORDER = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down", "fc1", "fc2")


@dataclass(frozen=True)
class Measured:
    """A size whose damage was measured; low and high are its 95% confidence interval."""

    bytes: int
    kl: float
    low: float | None = None
    high: float | None = None
    series: str = "measured"


@dataclass(frozen=True)
class Cell:
    """Bits per weight of one target. block: None for embeddings and heads, whose slices are then
    shown in the order given. weights: how many it holds, to average experts of one role.
    """

    role: str
    block: int | None
    bits: float
    weights: int = 1


@dataclass(frozen=True)
class ReportData:
    """Everything that a report shows.

    frontier: (weight bytes, damage) along the climb, as planned. opened: the one that is open.
    original_bytes: of the weights before compression. breakdown: bytes by the names in PARTS.
    facts: name and text of the figures at the top. columns, rows: the table.
    """

    model: str
    budget: int | None
    context: int
    batch: int
    breakdown: dict[str, int]
    frontier: Sequence[tuple[int, float]]
    opened: tuple[int, float]
    original_bytes: int
    allocation: Sequence[Cell]
    measured: Sequence[Measured] = ()
    facts: dict[str, str] = field(default_factory=dict)
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[Any]] = ()
    notes: str = ""

    def __post_init__(self) -> None:
        if missing := [p for p in PARTS if p not in self.breakdown]:
            raise PliantError(f"a report's breakdown needs {', '.join(PARTS)}; no {missing[0]}")
        if not self.frontier:
            raise PliantError("a report needs at least one point of the climb")

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


@dataclass(frozen=True)
class Grid:
    """The allocation as a heat map. bits[i][j]: of role `roles[i]` in block `blocks[j]`, None where
    there is none. strips: bits of the slices of each role outside the blocks.
    """

    roles: list[str]
    blocks: list[int]
    bits: list[list[float | None]]
    strips: dict[str, list[float]]

    @property
    def limits(self) -> tuple[float, float]:
        """The range of colours: whole bits around all cells, at least two apart."""
        found = [b for row in self.bits for b in row if b is not None]
        found += [b for strip in self.strips.values() for b in strip] or (
            [0.0] if not found else []
        )
        low, high = float(int(min(found))), float(-int(-max(found) // 1))
        return low, max(high, low + 2)


def grid_of(allocation: Sequence[Cell]) -> Grid:
    """Cells by role and block, experts of one role averaged by their weights."""
    sums: dict[tuple[str, int], tuple[float, int]] = {}
    strips: dict[str, list[float]] = {}
    for cell in allocation:
        role = short_role(cell.role)
        if cell.block is None:
            strips.setdefault(role, []).append(cell.bits)
            continue
        bits, weights = sums.get((role, cell.block), (0.0, 0))
        sums[role, cell.block] = bits + cell.bits * cell.weights, weights + cell.weights
    seen = list(dict.fromkeys(role for role, _ in sums))
    roles = sorted(seen, key=lambda r: _ROLE_ORDER.index(r) if r in _ROLE_ORDER else 99)
    blocks = sorted({block for _, block in sums})
    means = {at: bits / max(weights, 1) for at, (bits, weights) in sums.items()}
    return Grid(roles, blocks, [[means.get((r, b)) for b in blocks] for r in roles], strips)


def short_role(role: str) -> str:
    """A module's name as a label: q_proj is q, embed_tokens is embedding."""
    if role in ("embed_tokens", "wte", "word_embeddings", "embed_in"):
        return "embedding"
    if role in ("lm_head", "embed_out"):
        return "head"
    return role.removesuffix("_proj")


def opened_measure(data: ReportData) -> Measured | None:
    """The measurement of the opened size, if there is one within half a percent of its bytes."""
    size = data.opened[0]
    near = [m for m in data.measured if abs(m.bytes - size) <= 0.005 * size]
    return min(near, key=lambda m: abs(m.bytes - size), default=None)


def summary(data: ReportData) -> dict[str, str]:
    """The figures at the top of a report; the caller's facts come after."""
    size, planned = data.opened
    measured = opened_measure(data)
    damage = f"{planned:.3g} nats (planned)" if measured is None else f"{measured.kl:.3g} nats"
    facts = {
        "Weights": f"{format_size(size)} of {format_size(data.original_bytes)}",
        "Damage": damage,
    }
    if data.budget is not None:
        facts = {"Budget": format_size(data.budget)} | facts
    return facts | {"Context": f"{data.context:,} x {data.batch}"} | data.facts


def write_report(data: ReportData, directory: str | Path) -> list[Path]:
    """Write report.html, frontier.png, allocation.png, memory.png, table.png and report.json."""
    from pliant.measure.pages import page
    from pliant.measure.plots import save_pictures

    out = Path(directory)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.html").write_text(page(data), encoding="utf-8")
        (out / "report.json").write_text(json.dumps(data.as_dict(), indent=1), encoding="utf-8")
        pictures = save_pictures(data, out)
    except OSError as error:
        raise PliantError(f"the report cannot be written to {out}: {error}") from error
    return [out / "report.html", *pictures, out / "report.json"]
