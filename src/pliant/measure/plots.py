"""The report's pictures as PNG, for places that show no page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from pliant.budget import format_size
from pliant.measure.report import PART_NAMES, PARTS, Grid, ReportData, grid_of, opened_measure

INK, MUTED, RULE, ACCENT = "#1c1c1a", "#6b6a65", "#e4e3de", "#2a78d6"
PART_COLOURS = dict(zip(PARTS, ("#2a78d6", "#1baf7a", "#eda100", "#7b62d3", "#dddcd6"),
                        strict=True))  # fmt: skip
SERIES_COLOURS = ("#e2574c", "#1baf7a", "#eda100", "#7b62d3", "#d55181")
BITS_SCALE = ("#eef5fc", "#b7d3f6", "#6da7ec", "#2a78d6", "#184f95", "#0d2f5e")
_STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Inter", "Helvetica Neue", "Arial", "DejaVu Sans"],
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": RULE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titleweight": "bold",
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "figure.dpi": 160,
    "savefig.bbox": "tight",
    "savefig.pad_inches": 0.25,
}
MIB = 1 << 20


def save_pictures(data: ReportData, directory: Path) -> list[Path]:
    """Write frontier.png, allocation.png, memory.png and, where there is a table, table.png."""
    makers = {"frontier": frontier, "allocation": allocation, "memory": memory}
    if data.rows:
        makers["table"] = table
    paths = []
    with matplotlib.rc_context(_STYLE):
        for name, make in makers.items():
            figure = make(data)
            paths.append(directory / f"{name}.png")
            figure.savefig(paths[-1], facecolor="white", metadata={"Software": None})
            plt.close(figure)
    return paths


def frontier(data: ReportData) -> Any:
    """Damage by weight bytes along the climb, with what is open and what was measured."""
    figure, axes = plt.subplots(figsize=(8, 4.5))
    points = np.array([(size / MIB, damage) for size, damage in data.frontier])
    axes.plot(points[:, 0], points[:, 1], color=ACCENT, lw=2, label="climb, as planned")
    series: dict[str, list[Any]] = {}
    for point in data.measured:
        series.setdefault(point.series, []).append(point)
    for index, (name, found) in enumerate(series.items()):
        colour = SERIES_COLOURS[index % len(SERIES_COLOURS)]
        errors = [
            [max(0.0, p.kl - (p.low if p.low is not None else p.kl)) for p in found],
            [max(0.0, (p.high if p.high is not None else p.kl) - p.kl) for p in found],
        ]
        axes.errorbar([p.bytes / MIB for p in found], [p.kl for p in found], yerr=errors, fmt="o",
                      ms=5, color=colour, mec="white", mew=0.8, elinewidth=1.2, label=name,
                      zorder=4)  # fmt: skip
    mark_opened(axes, data)
    if min(d for _, d in data.frontier) > 0 and all(p.kl > 0 for p in data.measured):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y", color=RULE, lw=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel("weights, MiB")
    axes.set_ylabel("damage, nats a token")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.set_title(f"{data.model}: what each size costs")
    axes.legend(frameon=False, loc="upper right", labelcolor=INK)
    return figure


def mark_opened(axes: Any, data: ReportData) -> None:
    """A line at the opened size, and its damage: measured if it was, else planned."""
    size, planned = data.opened
    measured = opened_measure(data)
    damage = planned if measured is None else measured.kl
    axes.axvline(size / MIB, color=INK, lw=1, ls=(0, (3, 3)), zorder=2)
    axes.plot([size / MIB], [damage], "o", ms=10, mfc="none", mec=INK, mew=1.8, zorder=5)
    axes.annotate(
        f"open: {format_size(size)}, {damage:.3g} nats" + (" planned" if measured is None else ""),
        (size / MIB, damage), xytext=(10, 14), textcoords="offset points", weight="bold",
        bbox={"boxstyle": "round,pad=0.3", "fc": "white", "ec": "none", "alpha": 0.85}, zorder=6,
    )  # fmt: skip


def allocation(data: ReportData) -> Any:
    """Bits per weight: a row for each role, a column for each block, and the embedding's slices."""
    grid = grid_of(data.allocation)
    columns, rows, strips = max(len(grid.blocks), 8), len(grid.roles), len(grid.strips)
    cell = min(0.42, 12.6 / columns)
    height = max(1, rows) * max(cell, 0.3) + strips * 0.75 + 1.2
    heights = [max(rows, 0.01) * max(cell, 0.3)] + [0.32] * strips
    figure, axes = plt.subplots(
        1 + strips, 1, figsize=(columns * cell + 2.2, height), squeeze=False,
        gridspec_kw={"height_ratios": heights, "hspace": 0.9 / (sum(heights) / len(heights))},
    )  # fmt: skip
    low, high = grid.limits
    scale = {"cmap": LinearSegmentedColormap.from_list("bits", BITS_SCALE),
             "norm": Normalize(low, high)}  # fmt: skip
    main, shown = axes[0][0], None
    if rows:
        blocks = [[np.nan if b is None else b for b in row] for row in grid.bits]
        shown = _cells(main, blocks, scale, cell)
        main.set_yticks(range(rows), grid.roles)
        main.set_xticks(*_block_ticks(grid))
        main.set_xlabel("block")
    else:
        main.axis("off")
    main.set_title(f"{data.model}: bits per weight")
    for axis, (role, bits) in zip(axes[1:, 0], grid.strips.items(), strict=True):
        shown = _cells(axis, [bits], scale, 0.45)
        axis.set_yticks([0], [role])
        axis.set_xticks(range(len(bits)), [str(i + 1) for i in range(len(bits))])
        axis.set_xlabel("slice of rows")
    if shown is None:
        return figure
    bar = figure.colorbar(shown, ax=axes[:, 0].tolist(), fraction=0.025, pad=0.02)
    bar.set_label("bits")
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _cells(axis: Any, bits: list[list[float]], scale: dict[str, Any], cell: float) -> Any:
    """One heat map with white rules between cells and, where there is room, each cell's bits."""
    values = np.array(bits, dtype=float).reshape(len(bits), -1)
    shown = axis.imshow(values, aspect="auto", **scale)
    axis.set_xticks(np.arange(values.shape[1] + 1) - 0.5, minor=True)
    axis.set_yticks(np.arange(values.shape[0] + 1) - 0.5, minor=True)
    axis.grid(which="minor", color="white", lw=1.5)
    axis.tick_params(which="minor", length=0)
    axis.spines[:].set_visible(False)
    if cell >= 0.3:
        for (row, column), value in np.ndenumerate(values):
            if not np.isnan(value):
                dark = scale["norm"](value) > 0.5
                axis.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=7,
                          color="white" if dark else INK)  # fmt: skip
    return shown


def _block_ticks(grid: Grid) -> tuple[list[int], list[str]]:
    step = max(1, round(len(grid.blocks) / 15))
    at = list(range(0, len(grid.blocks), step))
    return at, [str(grid.blocks[i]) for i in at]


def memory(data: ReportData) -> Any:
    """One bar: what the running model holds, and what is left of the budget."""
    figure, axis = plt.subplots(figsize=(9, 1.5), gridspec_kw={"left": 0, "right": 1})
    total, left = sum(data.breakdown[p] for p in PARTS), 0.0
    handles = []
    for part in PARTS:
        size = data.breakdown[part]
        bar = axis.barh(0, size / MIB, left=left / MIB, color=PART_COLOURS[part], height=0.6,
                        edgecolor="white", lw=2)  # fmt: skip
        handles.append((bar, f"{PART_NAMES[part]}  {format_size(size)}"))
        if total and size / total > 0.09:
            ink = "white" if part in ("weights", "activations") else INK
            axis.text((left + size / 2) / MIB, 0, f"{size / total:.0%}", ha="center", va="center",
                      color=ink, weight="bold")  # fmt: skip
        left += size
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
    axis.set_xlim(0, max(left / MIB, 1e-9))
    axis.set_xlabel("MiB")
    where = f"context {data.context:,}, batch {data.batch}"
    budget = "" if data.budget is None else f" of {format_size(data.budget)}"
    used = format_size(total - data.breakdown["free"])
    axis.set_title(f"{data.model}: {used}{budget} in use at {where}")
    axis.legend([h for h, _ in handles], [name for _, name in handles], frameon=False, ncols=5,
                loc="upper left", bbox_to_anchor=(0, -0.42), handlelength=0.9, handleheight=0.9,
                columnspacing=1.4, borderaxespad=0, labelcolor=INK)  # fmt: skip
    return figure


def table(data: ReportData) -> Any:
    """The table as a picture, ruled between rows only."""
    cells = [[show(value) for value in row] for row in data.rows]
    widths = [max(len(str(name)), *(len(row[i]) for row in cells)) + 3
              for i, name in enumerate(data.columns)]  # fmt: skip
    figure, axis = plt.subplots(figsize=(max(6.0, 0.085 * sum(widths)), 0.3 * (len(cells) + 1.5)))
    axis.axis("off")
    drawn = axis.table(
        cells, colLabels=list(data.columns), loc="upper left", cellLoc="right", edges="horizontal",
        colWidths=[w / sum(widths) for w in widths], bbox=[0, 0, 1, 1],
    )  # fmt: skip
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(9)
    for (row, column), cell in drawn.get_celld().items():
        cell.set_edgecolor(RULE)
        cell.set_text_props(color=MUTED if row == 0 else INK)
        if column == 0:
            cell.set_text_props(ha="left")
            cell.PAD = 0.02
    return figure


def show(value: Any) -> str:
    """A table's value as text: floats to three digits, integers with separators."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
