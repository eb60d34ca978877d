"""The report and the plot of bench/cache.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from cache_protocol import CHUNK, PROMPT, PROTOCOLS, STEP, WINDOW
from pliant.measure.damage import bootstrap_ci95

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results" / "cache"
PAGE = ROOT / "docs" / "cache.md"
Row = dict[str, Any]


def write(rows: dict[str, Any], told: dict[str, Any]) -> None:
    """bench/results/cache.json, cache.png and docs/cache.md."""
    tables = {name: summaries(rows[name], rows["parts"]) for name in PROTOCOLS}
    kept = told | {"ids": rows["ids"], "rows": tables, "reuse": rows["reuse"]}
    RESULTS.with_suffix(".json").write_text(json.dumps(kept, indent=1) + "\n")
    PAGE.write_text("\n".join(page(tables, rows["reuse"], told)) + "\n")
    plot(tables, RESULTS.with_suffix(".png"))


def summaries(rows: dict[str, Row], parts: dict[str, Row]) -> list[Row]:
    """One row a policy and option set, smallest cache first, then what could not be measured."""
    sixteen = next((w["bytes_end"] for row in parts.values() if row["name"] == "keep"
                    for w in row["windows"].values()), 0)  # fmt: skip
    found = []
    for row in rows.values():
        kept = {key: value for key, value in row.items() if key != "windows"}
        windows = list(row["windows"].values())
        if windows:

            def mean(name: str, windows: list[Row] = windows) -> float:
                return float(np.mean([window[name] for window in windows]))

            kls = np.array([window["kl"] for window in windows])
            kept |= {
                "windows": len(windows), "bytes_prompt": mean("bytes_prompt"),
                "bytes_end": mean("bytes_end"), "share_prompt":
                mean("bytes_prompt") * WINDOW / PROMPT / sixteen if sixteen else None,
                "share": mean("bytes_end") / sixteen if sixteen else None,
                "read": mean("read") if "read" in windows[0] else None,
                "kl": float(kls.mean()), "kl_ci95": bootstrap_ci95(kls),
                "same": mean("same"), "seconds": mean("seconds"),
            }  # fmt: skip
        found.append(kept)
    return sorted(found, key=lambda row: row.get("bytes_end", float("inf")))


def page(tables: dict[str, list[Row]], reuse: dict[str, Row], told: dict[str, Any]) -> list[str]:
    versions = next((r["versions"] for t in tables.values() for r in t if r.get("peer")), {})
    lines = [
        "# KV policies, measured",
        "",
        f"`{told['command']}`, {told['date']}, {told['machine']}.",
        "",
        f"SmolLM2-135M with its 4-bit grid broken, weights in float32; at most {told['windows']} "
        f"windows of {WINDOW:,} tokens of WikiText-2's test split: {PROMPT:,} are the prompt, the "
        f"other {WINDOW - PROMPT} are read {STEP} at a time and each of their positions is scored.",
        "Damage is the mean KL divergence in nats a token from full attention over exact keys and",
        "values, with a 95% interval from resampling windows (from three on). Bytes are what",
        "is kept from one chunk to the next, at the end over all tokens; shares are of 16-bit keys",
        "and values, after the prompt and at the end. Read: the share that a step goes through,",
        "where it is less than what is kept. Same: the most likely next token is the original's.",
        "Windows: how many were measured. Seconds: of all cores together, a window, on a machine",
        "with other work.",
        "",
    ]
    if versions:
        lines += [
            f"Peers ({', '.join(f'{n} {v}' for n, v in versions.items())}) are in italics and ran",
            "on the same tokens. Their numbers in floating point count two bytes. kvpress drops",
            "tokens once, after the prompt, and keeps all that come after it; where it chooses",
            "them for each head it masks instead, and what is masked is not counted.",
            "",
        ]
    for name, rows in tables.items():
        if rows:
            lines += [f"## {name.capitalize()}", "", PROTOCOLS[name], "", *table(rows), ""]
    lines += reuse_table(reuse)
    return lines[:-1]


def table(rows: list[Row]) -> list[str]:
    lines = [
        "| policy | kind | paper | options | bytes a token | share: prompt, end | read | damage "
        "| 95% interval | same | windows | s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = f"*{row['name']}*" if row.get("peer") else row["name"]
        options = ", ".join(f"{k} {v}" for k, v in row["options"].items())
        start = f"| {name} | {row['kind']} | {row.get('paper', '')} | {options} |"
        if "kl" not in row:
            lines.append(f"{start} | | | {row.get('failed', 'not measured')} | | | | |")
            continue
        interval = "{:.4f} to {:.4f}".format(*row["kl_ci95"]) if row["windows"] > 2 else ""
        read = row["read"]
        less = f"{read:.3f}" if read is not None and read < 0.97 * (row["share"] or 1) else ""
        shares = f"{row['share_prompt']:.3f}, {row['share']:.3f}" if row["share"] else ""
        lines.append(
            f"{start} {row['bytes_end'] / WINDOW:.0f} | {shares} | {less} | {row['kl']:.4f} | "
            f"{interval} | {row['same']:.3f} | "
            f"{row['windows']} | {row['seconds']:.0f} |"
        )
    return lines


def reuse_table(rows: dict[str, Row]) -> list[str]:
    """Text put together from chunks and edited text (cache_reuse.py)."""
    if not rows:
        return []
    lines = [
        "## Reuse",
        "",
        "Keys and values of known text used again at another place: damage against computing all "
        f"of it, over the {WINDOW - PROMPT} tokens that follow, and the share of the prompt's "
        f"{PROMPT:,} tokens that had to be computed.",
        "",
        "| what | how | computed | damage | same |",
        "|---|---|---|---|---|",
    ]
    for row in rows.values():
        windows = list(row["windows"].values())
        kl, same, share = (float(np.mean([w[n] for w in windows]))
                           for n in ("kl", "same", "computed"))  # fmt: skip
        lines.append(f"| {row['what']} | {row['how']} | {share:.3f} | {kl:.4f} | {same:.3f} |")
    return [*lines, ""]


def plot(tables: dict[str, list[Row]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(13, 5.2), dpi=110, sharey=True)
    names = sorted({(bool(r.get("peer")), r["name"]) for t in tables.values() for r in t})
    for axis, (title, rows) in zip(axes, tables.items(), strict=True):
        for i, (peer, name) in enumerate(names):
            points = [(r["share"], r["kl"]) for r in rows
                      if r["name"] == name and r.get("share") and r.get("kl", 0) > 0]  # fmt: skip
            if points:
                style = {"ls": "--", "mfc": "none"} if peer else {"ls": "-"}
                axis.plot(*zip(*sorted(points), strict=True), marker="osD^vP*Xph"[i % 10], ms=5,
                          color=f"C{i % 10}", lw=0.8, label=name, **style)  # fmt: skip
        axis.set(xscale="log", yscale="log", xlabel="share of 16-bit bytes at the end")
        axis.set_title(
            {"parts": f"prompt read {CHUNK} tokens at a time"}.get(title, "prompt at once")
        )
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("damage: KL, nats a token")
    handles: dict[str, Any] = {}
    for axis in axes:
        shown, labels = axis.get_legend_handles_labels()
        handles |= dict(zip(labels, shown, strict=True))
    figure.legend(handles.values(), handles, loc="center right", fontsize=7,
                  title="dashed: peers", title_fontsize=7)  # fmt: skip
    figure.tight_layout(rect=(0, 0, 0.84, 1))
    figure.savefig(path)
    plt.close(figure)
