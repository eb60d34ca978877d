"""Ways to cut a product of the decode kernel: candidates, a formula, and what was measured.

shapes.json holds the times of bench/kernels.py on some GPUs (bench/shapes.py writes it). A GPU of
the same compute capability and multiprocessors takes the fastest cut of a product that was
measured; for one near to those, what costs them least on average.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from pliant.codes import GroupInt, GroupLevels
from pliant.codes.packing import PLANES
from pliant.kernels.cuda.decode import Shape, Terms, level_digits

_LOG = logging.getLogger(__name__)
_SHIPPED = Path(__file__).with_name("shapes.json")
_KINDS = ("integers", "levels one digit", "levels")  # by `level_digits`
_LONG = 3 << 10  # bytes of a row from which it keeps 16 warps busy
_FAR = 0.5  # `_distance` beyond which what was measured says less than the formula
# of a logarithm of time: how much better than the formula's cut that of neighbours must be
_BETTER = 0.02


@dataclass(frozen=True)
class Case:
    """A product, by what its best cut depends on.

    kind: "integers", "levels" (of two digits) or "levels one digit"; a variant begins with the
    word of what it is a variant of. rows: of x, the most that the same compiled kernel takes.
    packed: scales or zero points are packed integers. rank: of a low-rank term.
    """

    kind: str
    bits: int
    out: int
    width: int
    rows: int = 1
    group: int = 128
    packed: bool = False
    rank: int = 0
    sparse: bool = False

    @staticmethod
    def of(code: GroupInt | GroupLevels, n: int, terms: Terms = Terms()) -> Case:
        extra = code.selector if isinstance(code, GroupLevels) else code.zeros
        return Case(
            kind=_KINDS[level_digits(code)],
            bits=code.bit_width,
            out=code.shape[0],
            width=code.width,
            rows=most_rows(n),
            group=code.group_size,
            packed=code.stored_scales.bits < 16 or extra is not None,
            rank=0 if terms.factor is None else terms.factor.shape[1],
            sparse=terms.values is not None,
        )

    @property
    def key(self) -> str:
        return " ".join(f"{name}={value}" for name, value in asdict(self).items())

    @property
    def row_bytes(self) -> float:
        return self.width * self.bits / 8


@dataclass(frozen=True)
class Gpu:
    name: str
    capability: tuple[int, int]
    multiprocessors: int

    @staticmethod
    @cache
    def of(device: torch.device) -> Gpu | None:
        if device.type != "cuda":
            return None
        about = torch.cuda.get_device_properties(device)
        return Gpu(about.name, (about.major, about.minor), int(about.multi_processor_count))


@dataclass(frozen=True)
class Cut:
    """A shape without the matrix's height: `share` blocks a multiprocessor.

    other: not the loads of a chunk that the kernel chooses itself.
    """

    warps: int
    share: int
    depth: int = 0
    other: bool = False

    def shape(self, case: Case, multiprocessors: int) -> Shape:
        tiles = -(-_row_tiles(case, multiprocessors) // self.share)
        loads = 0 if not self.other else 1 if _segments(case.bits) == 1 else 2
        return Shape(self.warps, tiles, self.depth, loads)


CUTS = (
    *(Cut(8, 1), Cut(8, 1, depth=2), Cut(8, 1, other=True), Cut(8, 2)),
    *(Cut(16, 1), Cut(16, 1, depth=2), Cut(16, 1, other=True), Cut(16, 2)),
    *(Cut(4, 2), Cut(4, 4)),
)


def most_rows(n: int) -> int:
    """Of x, in the compiled kernel that takes n."""
    return next(rows for rows in (1, 4, 8, 16) if n <= rows)


def candidates(case: Case, multiprocessors: int, most: int = 16) -> tuple[Shape, ...]:
    """What is worth timing, each once, the formula's first.

    most: warps that the compiled kernel runs with (`tuning.most_warps`).
    """
    segments = _segments(case.bits)
    first = formula(case, multiprocessors, most)
    found = {first: None}
    for cut in CUTS:
        if cut.warps > most or (cut.depth and segments > 3):
            continue
        compiled = (segments, case.rows, cut.warps) == (3, 1, 8) and most >= 16
        if cut.other and segments > 1 and not compiled:
            continue
        found[cut.shape(case, multiprocessors)] = None
    return tuple(found)


def formula(case: Case, multiprocessors: int, most: int = 16) -> Shape:
    """About one block a multiprocessor, which makes x digits once, or two that share it.

    Long rows want 16 warps, or two blocks of eight where the registers allow no more; so do levels,
    which take more instructions a byte. A block of many rows holds many scales and sums: from four
    tiles on it is split, too. Of two bits with packed scales a block has more to do for its scales
    than for its weights: one of eight warps is enough.
    """
    tiles = _row_tiles(case, multiprocessors)
    if case.packed and case.kind != "integers" and case.bits <= 2:
        return Shape(min(8, most), tiles)
    long = case.row_bytes >= _LONG
    if tiles < 4 and long and most >= 16:
        return Shape(16, tiles)
    split = tiles >= 4 or long or case.kind != "integers"
    return Shape(min(8, most), -(-tiles // 2) if split else tiles)


def fitting_warps(bits: int, shared: int) -> int:
    """Warps whose rings of weights take at most six tenths of `shared` bytes: x wants the rest."""
    warps, loads = 16, 2 if _segments(bits) == 1 else 1
    while warps > 1 and warps * 2048 * _segments(bits) * loads > 0.6 * shared:
        warps //= 2
    return warps


def _row_tiles(case: Case, multiprocessors: int) -> int:
    """Tiles of 16 rows of a block when there is one a multiprocessor."""
    return max(1, min(-(-case.out // (16 * multiprocessors)), 12))


def _segments(bits: int) -> int:
    return bits // PLANES[bits][-1]


@dataclass(frozen=True)
class Measured:
    """Microseconds of the shapes of a product that were timed on a GPU."""

    case: Case
    multiprocessors: int
    capability: tuple[int, int]
    times: Mapping[Shape, float]

    def formula(self) -> Shape:
        return formula(self.case, self.multiprocessors)

    def best(self) -> Shape:
        return min(self.times, key=self.times.__getitem__)


@dataclass(frozen=True)
class Table:
    rows: tuple[Measured, ...]

    def shape(self, case: Case, gpu: Gpu) -> Shape | None:
        """The fastest that was measured, or of the nearest; None: no such GPU, or all are far."""
        alike = [
            row
            for row in self.rows
            if (row.capability, row.multiprocessors) == (gpu.capability, gpu.multiprocessors)
        ]
        same = [row for row in alike if row.case == case]
        if same:
            return same[-1].best()
        usual = formula(case, gpu.multiprocessors)
        at = [(_distance(case, row.case), row) for row in alike if row.formula() == usual]
        near = [(distance, row) for distance, row in at if distance <= _FAR]
        return _of_near(near, usual) if near else None


def _of_near(near: list[tuple[float, Measured]], usual: Shape) -> Shape:
    """What costs the measured products least, the near ones counting most.

    Times of two runs differ by a few hundredths: a shape that is hardly better than the usual one
    is not taken for it.
    """
    weights = [1 / (0.1 + distance) for distance, _ in near]
    costs: dict[Shape, float] = {}
    for shape in {shape for _, row in near for shape in row.times}:
        known = [
            (weight, math.log(row.times[shape] / min(row.times.values())))
            for weight, (_, row) in zip(weights, near, strict=True)
            if shape in row.times
        ]
        seen = sum(weight for weight, _ in known)
        if seen > 0.5 * sum(weights):
            costs[shape] = sum(weight * slower for weight, slower in known) / seen
    best = min(costs, key=costs.__getitem__, default=usual)
    return best if costs.get(best, 0) < costs.get(usual, math.inf) - _BETTER else usual


def _distance(a: Case, b: Case) -> float:
    """In doublings of rows and of bytes a row, and what other codes add to it.

    Infinite for other kernels: widths, rows of x and terms are compiled apart.
    """
    if (a.bits, a.rows, bool(a.rank), a.sparse) != (b.bits, b.rows, bool(b.rank), b.sparse):
        return math.inf
    away = math.hypot(math.log2(a.out / b.out), math.log2(a.row_bytes / b.row_bytes))
    if a.kind != b.kind:
        away += 0.25 if a.kind.split()[0] == b.kind.split()[0] else math.inf
    return away + (a.packed != b.packed) + 0.25 * abs(math.log2(a.group / b.group))


@cache
def shipped() -> Table:
    """What comes with the package; empty, with a line in the log, where it cannot be read."""
    try:
        return read_table(json.loads(_SHIPPED.read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _LOG.warning("no measured shapes of the decode kernel: %s", error)
        return Table(())


def read_table(content: Mapping[str, Any]) -> Table:
    rows = []
    for device in content["devices"]:
        major, minor = device["capability"]
        for row in device["products"]:
            times = {parse(text): float(took) for text, took in row["us"].items()}
            rows.append(
                Measured(Case(**row["case"]), int(device["multiprocessors"]), (major, minor), times)
            )
    return Table(tuple(rows))


def written(shape: Shape) -> str:
    """warps/tiles/depth/loads."""
    return f"{shape.warps}/{shape.row_tiles}/{shape.depth}/{shape.loads}"


def parse(text: str) -> Shape:
    """`written` read; a ValueError for what is no shape that the kernel takes."""
    warps, tiles, depth, loads = (int(part) for part in text.split("/"))
    if not (1 <= warps <= 16 and tiles >= 1 and depth in (0, 2, 4) and loads in (0, 1, 2)):
        raise ValueError(f"{text} is no shape of the decode kernel")
    return Shape(warps, tiles, depth, loads)
