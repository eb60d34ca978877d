"""Rows of bench/quality.py: kept in a file as they are measured, merged, and judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

COMPARISONS = ("total", "linear")
COUNTED_BITS = 4.6
EACH, BEST = 0.75, 0.9  # our damage over each peer's, and over the best's at that size or smaller
Row = dict[str, Any]
Sizes = dict[str, dict[str, list[int]]]  # of copy and comparison


class Rows:
    """peers: "copy|peer|point" to what it measured; failed: the same to why it is missing.

    ours: "copy|comparison|effort|bytes". settings: each text that was measured on; rows that were
    measured on another text of the same name are refused.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path, self.settings = path, settings
        self.peers: dict[str, Row] = {}
        self.ours: dict[str, Row] = {}
        self.failed: dict[str, str] = {}
        if path.exists():
            self.merge(path)

    def merge(self, path: Path) -> None:
        """Take over the rows of another run, on this machine or another."""
        kept = json.loads(path.read_text())
        for text in kept["settings"].keys() & self.settings.keys():
            if kept["settings"][text] != self.settings[text]:
                raise SystemExit(
                    f"{path} was measured on other windows of {text}, {kept['settings'][text]} and "
                    f"not {self.settings[text]}; use another --work, or the same options"
                )
        self.settings = kept["settings"] | self.settings
        for name in ("peers", "ours", "failed"):
            mine: dict[str, Any] = getattr(self, name)
            for key, row in kept[name].items():
                mine[key] = mine[key] | row if isinstance(row, dict) and key in mine else row
        self.failed = {k: v for k, v in self.failed.items() if k not in self.peers}

    def save(self) -> None:
        beside = self._path.with_suffix(".tmp")
        beside.write_text(
            json.dumps({"settings": self.settings, "peers": self.peers, "ours": self.ours,
                        "failed": self.failed}, indent=1)
        )  # fmt: skip
        beside.replace(self._path)

    def sizes(self, copy: str, comparison: str, everything: bool = False) -> list[int]:
        """Bytes at which ours is wanted: of the peers' points that count, or of all."""
        points = self.points(copy, comparison)
        return sorted({p["bytes"] for p in points if everything or p["bits"] <= COUNTED_BITS})

    def points(self, copy: str, comparison: str) -> list[Row]:
        """The peers' measured points of one comparison, by bytes."""
        found = [
            {**row, **row[comparison], "bytes": size_of(row, comparison)}
            for key, row in self.peers.items()
            if key.split("|")[0] == copy and "kl" in row.get(comparison, {})
        ]
        return sorted(found, key=lambda point: (point["bytes"], point["kl"]))

    def copies(self) -> list[str]:
        return list(dict.fromkeys(key.split("|")[0] for key in (*self.peers, *self.failed)))

    def efforts(self, copy: str) -> list[str]:
        """Those of ours that were measured; one without a name when none was."""
        found = [key.split("|")[2] for key in self.ours if key.split("|")[0] == copy]
        return list(dict.fromkeys(found)) or [""]

    def judged(self, copy: str, comparison: str, effort: str) -> list[Row]:
        """Each point with ours at its bytes, ratios and verdict.

        best: the lowest damage of any counted point that is not larger. passed: None where the
        point does not count, False where ours was not measured or cannot open that small.
        """
        found = []
        points = self.points(copy, comparison)
        for point in points:
            counted = point["bits"] <= COUNTED_BITS
            ours = self.ours_at(copy, comparison, effort, point["bytes"])
            smaller = [p for p in points if p["bytes"] <= point["bytes"]]
            best = min(smaller, key=lambda p: p["kl"])
            row = point | {"counted": counted, "ours": ours, "best": best}
            if "kl" in ours:
                assert ours["bytes"] <= point["bytes"]
                row["ratio"] = ours["kl"] / point["kl"]
                row["best_ratio"] = ours["kl"] / best["kl"]
                passed = row["ratio"] <= EACH and row["best_ratio"] <= BEST
                row["passed"] = passed if counted else None
            else:
                row["passed"] = False if counted else None
            found.append(row)
        return found

    def ours_at(self, copy: str, comparison: str, effort: str, size: int) -> Row:
        """Ours at that size, or at the largest measured one below it."""
        stem = f"{copy}|{comparison}|{effort}|"
        known = [row for key, row in self.ours.items() if key.startswith(stem) and "kl" in row]
        fitting = [row for row in known if row["bytes"] <= size]
        at = self.ours.get(f"{stem}{size}", {})  # it may say that it opens no smaller
        return max(fitting, key=lambda row: row["bytes"], default=at)

    def kinds(self, copy: str, effort: str) -> list[Row]:
        """Ours against the best peer of at most that size, on each kind of other text."""
        found = []
        points = [p for p in self.points(copy, "total") if p.get("kinds")]
        for point in points:
            ours = self.ours_at(copy, "total", effort, point["bytes"]).get("kinds", {})
            if point["bits"] > COUNTED_BITS:
                continue
            for kind, own in point["kinds"].items():
                smaller = [p for p in points if p["bytes"] <= point["bytes"] and kind in p["kinds"]]
                best = min(smaller, key=lambda p: p["kinds"][kind]["kl"])
                row = {"kind": kind, "point": point, "theirs": own, "best": best,
                       "best_kl": best["kinds"][kind]["kl"], "ours": ours.get(kind)}  # fmt: skip
                row["passed"] = kind in ours and ours[kind]["kl"] <= row["best_kl"]
                found.append(row)
        return found


def size_of(row: Row, comparison: str) -> int:
    """total: everything that is loaded. linear: the linear layers with scales and codebooks."""
    if comparison == "linear":
        return int(row["linear_bytes"])
    return int(row["linear_bytes"] + row["outer_bytes"] + row["other_bytes"])


def write_sizes(path: Path, rows: Rows) -> None:
    """The bytes at which ours is to be measured."""
    sizes = {name: {c: rows.sizes(name, c) for c in COMPARISONS} for name in rows.copies()}
    path.write_text(json.dumps(sizes, indent=1))


def read_sizes(path: Path) -> Sizes:
    found: Sizes = json.loads(path.read_text())
    return found
