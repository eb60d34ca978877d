"""The table and the plot of bench/quality.py."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

from quality_rows import BEST, COMPARISONS, COUNTED_BITS, EACH, Row, Rows

TITLES = {
    "total": "Everything that is loaded: linear layers, embedding and head, norms",
    "linear": "Linear layers alone, embedding and head as they were on both sides",
}


def write_results(rows: Rows, stem: str | Path, command: str) -> None:
    """STEM.json, STEM.md and STEM.png."""
    stem = Path(stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    kept = {"settings": rows.settings, "peers": rows.peers, "ours": rows.ours,
            "failed": rows.failed}  # fmt: skip
    stem.with_suffix(".json").write_text(json.dumps(kept, indent=1))
    lines = ["# Ours against peers at their bytes", "", f"`{command}`", ""]
    lines += [
        f"Texts (windows, length): "
        f"{', '.join(f'{n} {s[0]} x {s[1]}' for n, s in rows.settings.items())}.",
        "Damage is KL in nats a token, the second half of each window scored.",
        f"Every point of at most {COUNTED_BITS} bits a weight of its linear layers counts:",
        f"ours is to be at most {EACH} of its damage, and at most {BEST} of the damage of the best",
        "peer that is not larger.",
        "",
    ]
    for copy in rows.copies():
        for effort in rows.efforts(copy):
            title = f"{copy}, effort {effort}" if effort else copy
            for comparison in COMPARISONS:
                judged = rows.judged(copy, comparison, effort)
                if judged:
                    lines += [f"## {title}: {TITLES[comparison]}", "", *_table(judged), ""]
            lines += _kinds(rows.kinds(copy, effort), title)
    if rows.failed:
        lines += ["## Points that could not be made", "", "| point | reason |", "|---|---|"]
        lines += [f"| {key.replace('|', ' / ')} | {why} |" for key, why in rows.failed.items()]
    stem.with_suffix(".md").write_text("\n".join(lines).rstrip() + "\n")
    _plot(rows, stem.with_suffix(".png"))


def verdict(judged: list[Row]) -> str:
    counted = [row for row in judged if row["counted"]]
    passed = sum(bool(row["passed"]) for row in counted)
    missing = sum("kl" not in row["ours"] for row in counted)
    told = f", ours is missing at {missing}" if missing else ""
    return f"{passed} of {len(counted)} counted points pass{told}."


def _table(judged: list[Row]) -> list[str]:
    lines = [
        verdict(judged),
        "",
        "| peer and point | MiB | bits | KL | 95% interval | ppl | top-1 | our MiB | our KL | ppl "
        "| top-1 | ratio | best peer of that size | ratio | |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in judged:
        low, high = row["kl_ci95"]
        ours = row["ours"]
        told = {None: "not counted", True: "pass", False: "FAIL"}[row["passed"]]
        if "kl" in ours:
            mine = (f"{_mib(ours['bytes'])} | {ours['kl']:.4f} | {ours['perplexity']:.2f} | "
                    f"{ours['top1']:.3f} | {row['ratio']:.2f}")  # fmt: skip
        elif "smallest_bytes" in ours:
            mine = f"from {_mib(ours['smallest_bytes'])} | | | |"
        else:
            mine = " | | | |"
        against = f"{row['best_ratio']:.2f}" if "best_ratio" in row else ""
        lines.append(
            f"| {_name(row)} | {_mib(row['bytes'])} | {row['bits']:.2f} | {row['kl']:.4f} | "
            f"{low:.4f} to {high:.4f} | {row['perplexity']:.2f} | {row['top1']:.3f} | {mine} | "
            f"{_name(row['best'])} {row['best']['kl']:.4f} | {against} | {told} |"
        )
    noted = {_name(row): row["note"] for row in judged if row.get("note")}
    if noted:
        lines += ["", *(f"- {name}: {note}" for name, note in noted.items())]
    return lines


def _kinds(found: list[Row], title: str) -> list[str]:
    if not found:
        return []
    passed = sum(bool(row["passed"]) for row in found)
    lines = [
        f"## {title}: text of other kinds, everything that is loaded",
        "",
        f"Ours is to be no worse than the best peer that is not larger: {passed} of {len(found)}.",
        "",
        "| text | peer and point | MiB | KL | best peer of that size | our KL | ratio | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(found, key=lambda r: (r["kind"], r["point"]["bytes"])):
        mine, told = " | ", "FAIL"
        if row["ours"]:
            mine = f"{row['ours']['kl']:.4f} | {row['ours']['kl'] / row['best_kl']:.2f}"
            told = "pass" if row["passed"] else "FAIL"
        lines.append(
            f"| {row['kind']} | {_name(row['point'])} | {_mib(row['point']['bytes'])} | "
            f"{row['theirs']['kl']:.4f} | {_name(row['best'])} {row['best_kl']:.4f} | {mine} | "
            f"{told} |"
        )
    return [*lines, ""]


def _name(row: Row) -> str:
    return f"{row['peer']} {row['point']}"


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f}"


_TOP = 6.0  # of the plot: what is above it is no language model


def _plot(rows: Rows, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    copies = [copy for copy in rows.copies() if any(rows.points(copy, c) for c in COMPARISONS)]
    if not copies:
        return
    figure, grid = plt.subplots(
        len(copies), len(COMPARISONS), figsize=(12, 4.6 * len(copies)), dpi=110, squeeze=False,
        sharey=True,
    )  # fmt: skip
    series = sorted({_series(p) for copy in copies for c in COMPARISONS
                     for p in rows.points(copy, c)})  # fmt: skip
    style = {name: (f"C{i % 10}", "osD^vP*Xphd<>8"[i % 14]) for i, name in enumerate(series)}
    for (row, copy), (column, comparison) in product(enumerate(copies), enumerate(COMPARISONS)):
        axis = grid[row, column]
        for name in series:
            points = [(p["bytes"], min(p["kl"], _TOP)) for p in rows.points(copy, comparison)
                      if _series(p) == name]  # fmt: skip
            if points:
                color, marker = style[name]
                axis.plot(*_mib_axis(points), marker, color=color, ms=5, alpha=0.8, label=name)
        for effort in rows.efforts(copy):
            prefix = f"{copy}|{comparison}|{effort}|"
            ours: list[tuple[int, float]] = sorted(
                (own["bytes"], own["kl"])
                for key, own in rows.ours.items()
                if key.startswith(prefix) and "kl" in own
            )
            if ours:
                axis.plot(*_mib_axis(ours), "k-", lw=2, label=f"Pliant, one artifact, {effort}")
        what = "everything loaded" if comparison == "total" else "linear layers alone"
        axis.set(yscale="log", title=f"{copy}, {what}", xlabel="MiB")
        axis.grid(alpha=0.3, which="both")
    for axis in grid[:, 0]:
        axis.set(ylabel="damage: KL, nats a token")
    shown = {label: handle for axis in grid.flat
             for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}  # fmt: skip
    figure.tight_layout()
    figure.legend(shown.values(), shown.keys(), fontsize=8, loc="center left",
                  bbox_to_anchor=(1.0, 0.5))  # fmt: skip
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def _series(point: Row) -> str:
    """A peer, and of llama.cpp how its types were applied."""
    if point["peer"] != "llama_cpp":
        return str(point["peer"])
    return f"llama.cpp {str(point['point']).partition('-')[0]}"


def _mib_axis(points: list[tuple[int, float]]) -> tuple[Any, Any]:
    return [size / 2**20 for size, _ in points], [kl for _, kl in points]
