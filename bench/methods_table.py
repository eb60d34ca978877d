"""What bench/methods.py measured: kept in a file, merged from several, and shown in a document."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

from methods_rows import CURVE, NOTES, ROWS
from pliant.methods import catalog

Found = dict[str, dict[str, Any]]  # by the row's key


class Known:
    """Measured rows in a file, with what they were measured on: {settings, rows}."""

    def __init__(self, path: Path, settings: dict[str, Any] | None = None) -> None:
        self._path, self.settings = path, settings
        self.rows: Found = {}
        if path.exists():
            self.merge(path)

    def merge(self, path: Path) -> None:
        """Take over the rows of another file that are not known here. Exits on other settings."""
        if not path.is_file():
            raise SystemExit(f"there is no {path}; --merge takes the methods.json of another run")
        given = json.loads(path.read_text())
        if self.settings is None:
            self.settings = given["settings"]
        if given["settings"] != self.settings:
            raise SystemExit(f"{path} holds rows of {given['settings']}, not of {self.settings}")
        self.rows = given["rows"] | self.rows

    def add(self, key: str, found: dict[str, Any]) -> None:
        self.rows[key] = found
        self.save()

    def save(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        beside = self._path.with_suffix(".tmp")
        beside.write_text(json.dumps({"settings": self.settings, "rows": self.rows}, indent=1))
        beside.replace(self._path)


def gptq_at(rows: Found, bits: float) -> float | None:
    """GPTQ's damage at so many bits, between its measured sizes; None outside them."""
    curve = sorted((rows[row.key]["bits"], rows[row.key]["kl"]) for row in CURVE
                   if row.key in rows)  # fmt: skip
    for (low, worse), (high, better) in pairwise(curve):
        if low <= bits <= high:
            share = (bits - low) / (high - low)
            return math.exp((1 - share) * math.log(worse) + share * math.log(better))
    return None


def write(known: Known, path: Path) -> None:
    """docs/methods.md: the catalog, and a table for each section of rows."""
    settings, rows = known.settings or {}, known.rows
    devices = sorted({found["device"] for found in rows.values()})
    shared = max((found["processes"] for found in rows.values()), default=1)
    lines = [
        "# Methods",
        "",
        "`pliant methods` lists them with their options. A recipe names them (docs/guide.md).",
        "docs/choosing.md says which to use when.",
        "",
        "| method | kind | paper | needs |",
        "|---|---|---|---|",
        *(
            f"| {info.name} | {info.kind} | {info.paper} | {', '.join(info.needs) or 'nothing'} |"
            for info in catalog().values()
        ),
        "",
        f"## Measured: {settings.get('model')}, all linear layers alike",
        "",
        f"`python bench/methods.py --text wikitext2-test.txt --windows {settings.get('windows')} "
        f"--sequences {settings.get('sequences')}`, on {', '.join(devices)}.",
        "",
        "Bits count integers, scales, zero points, codebooks, factors and indices. Second moments",
        "are weighted by the likelihood's gradient for every method that uses them. Seconds are of",
        f"making all codes, without the observing pass{_beside(shared)}. The last",
        "column is the damage over that of GPTQ at the same bytes (below 1 is better than GPTQ).",
    ]
    head = (
        "| method | options | bits | KL (nats/token) | 95% interval | perplexity | top-1 | seconds "
        "| of GPTQ's |",
        "|---|---|---|---|---|---|---|---|---|",
    )
    section = None
    for row in (*CURVE, *ROWS):
        found = rows.get(row.key)
        if found is None:
            continue
        if row.section != section:
            section = row.section
            note = [NOTES[section], ""] if section in NOTES else []
            lines += ["", f"### {section}", "", *note, *head]
        low, high = found["kl_ci95"]
        gptq = gptq_at(rows, found["bits"])
        ratio = "" if gptq is None else f"{found['kl'] / gptq:.2f}"
        rejected = ", rejected by held-out text" if found.get("accepted") is False else ""
        lines.append(
            f"| {row.label}{rejected} | {row.asked} | {found['bits']:.3f} | {found['kl']:.4f} | "
            f"{low:.4f} to {high:.4f} | {found['perplexity']:.2f} | {found['top1']:.3f} | "
            f"{found['seconds']:.0f} | {ratio} |"
        )
    path.write_text("\n".join(lines) + "\n")


def _beside(processes: int) -> str:
    return "" if processes == 1 else f", {processes} processes beside each other"
