"""The report as one page of HTML: styles, data and plotly inside it, no network needed."""

from __future__ import annotations

import json
from html import escape
from typing import Any

from plotly.offline import get_plotlyjs

from pliant.budget import format_size
from pliant.measure.plots import BITS_SCALE, MIB, PART_COLOURS, SERIES_COLOURS, show
from pliant.measure.report import (
    PART_NAMES,
    PARTS,
    ReportData,
    grid_of,
    opened_measure,
    summary,
)

_CSS = """
:root { --page:#f7f7f4; --card:#ffffff; --ink:#1c1c1a; --muted:#66655f; --rule:#e4e3de;
  --accent:#2a78d6; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --page:#161615; --card:#20201e; --ink:#f2f1ec;
  --muted:#a3a29b; --rule:#363633; --accent:#5b9cea; } }
* { box-sizing: border-box; }
body { margin:0; background:var(--page); color:var(--ink);
  font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif; }
main { max-width:1080px; margin:0 auto; padding:32px 20px 64px; }
h1 { font-size:26px; line-height:1.2; margin:0 0 4px; letter-spacing:-0.01em;
  overflow-wrap:anywhere; }
h2 { font-size:16px; margin:0 0 2px; }
p { margin:0; color:var(--muted); max-width:72ch; }
section { background:var(--card); border:1px solid var(--rule); border-radius:12px;
  padding:20px; margin-top:16px; }
dl { display:grid; grid-template-columns:repeat(auto-fit,minmax(150px,1fr)); gap:12px;
  margin:20px 0 0; }
dl > div { background:var(--card); border:1px solid var(--rule); border-radius:12px;
  padding:12px 16px; }
dt { color:var(--muted); font-size:13px; }
dd { margin:2px 0 0; font-size:18px; font-weight:600; font-variant-numeric:tabular-nums; }
.bar { display:flex; gap:2px; height:40px; margin:16px 0 12px; }
.bar > span { border-radius:4px; min-width:2px; }
.key { display:flex; flex-wrap:wrap; gap:6px 20px; margin:0; padding:0; list-style:none;
  font-variant-numeric:tabular-nums; }
.key i { display:inline-block; width:12px; height:12px; border-radius:3px; margin-right:8px; }
.key b { font-weight:600; }
.plot { width:100%; }
.scroll { overflow-x:auto; margin-top:8px; }
table { border-collapse:collapse; width:100%; font-variant-numeric:tabular-nums; }
th, td { text-align:right; padding:7px 12px; border-bottom:1px solid var(--rule);
  white-space:nowrap; }
th { color:var(--muted); font-weight:500; font-size:13px; }
th:first-child, td:first-child { text-align:left; padding-left:0; }
tr.open td { font-weight:600; }
tbody tr:last-child td { border-bottom:0; }
@media (max-width:560px) { main { padding:20px 12px 40px; } section { padding:16px 12px; }
  h1 { font-size:22px; } }
"""

_SCRIPT = """
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
function themed(value) {  // "var(--x)" anywhere in a figure becomes the theme's colour
  if (typeof value === "string") {
    const found = value.match(/^var\\((--[a-z]+)\\)$/);
    return found ? css(found[1]) : value;
  }
  if (Array.isArray(value)) return value.map(themed);
  if (value && typeof value === "object")
    return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, themed(v)]));
  return value;
}
function draw() {
  const narrow = window.innerWidth < 560;
  for (const [id, figure] of Object.entries(FIGURES)) {
    const {data, layout} = themed(figure);
    if (narrow && layout.margin) layout.margin.l = Math.min(layout.margin.l, 56);
    Plotly.react(id, data, layout, {responsive: true, displayModeBar: false});
  }
}
draw();
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
"""


def page(data: ReportData) -> str:
    """The whole page."""
    grid = grid_of(data.allocation)
    figures = {"frontier": _frontier(data)}
    if grid.roles:
        figures["allocation"] = _heatmap(data)
    figures |= {f"strip{i}": _strip(data, role) for i, role in enumerate(grid.strips)}
    strips = "".join(f'<div id="strip{i}" class="plot"></div>' for i in range(len(grid.strips)))
    layers = '<div id="allocation" class="plot"></div>' if grid.roles else ""
    notes = f"<p>{escape(data.notes)}</p>" if data.notes else ""
    encoded = json.dumps(figures).replace("</", "<\\/")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(data.model)} - Pliant report</title><style>{_CSS}</style></head>
<body><main>
<header><h1>{escape(data.model)}</h1><p>{_subtitle(data)}</p>{_facts(data)}</header>
<section><h2>Memory</h2><p>What the running model holds at a context of {data.context:,} and a batch
of {data.batch}.</p>{_bar(data)}</section>
<section><h2>Size and damage</h2><p>Damage is the mean KL divergence from the original model's
next-token distribution, in nats a token: lower is better. The line is the climb as planned.</p>
<div id="frontier" class="plot"></div></section>
<section><h2>Allocation</h2><p>Bits per weight of every matrix at the opened size, scales and zero
points included.</p>{layers}{strips}</section>
{_table(data)}
{notes}
</main><script>{get_plotlyjs()}</script>
<script>const FIGURES = {encoded};{_SCRIPT}</script></body></html>
"""


def _subtitle(data: ReportData) -> str:
    size = data.opened[0]
    share = (
        f"{size / data.original_bytes:.0%} of the original's bytes" if data.original_bytes else ""
    )
    return f"Opened at {format_size(size)} of weights, {share}."


def _facts(data: ReportData) -> str:
    items = (
        f"<div><dt>{escape(name)}</dt><dd>{escape(str(text))}</dd></div>"
        for name, text in summary(data).items()
    )
    return f"<dl>{''.join(items)}</dl>"


def _bar(data: ReportData) -> str:
    spans, keys = [], []
    for part in PARTS:
        size, colour = data.breakdown[part], PART_COLOURS[part]
        colour = "var(--rule)" if part == "free" else colour
        label = f"{PART_NAMES[part]}: {format_size(size)}"
        if size > 0:
            spans.append(f'<span style="flex:{size};background:{colour}" title="{label}"></span>')
        keys.append(
            f'<li><i style="background:{colour}"></i>{PART_NAMES[part]} '
            f"<b>{format_size(size)}</b></li>"
        )
    return f'<div class="bar">{"".join(spans)}</div><ul class="key">{"".join(keys)}</ul>'


def _table(data: ReportData) -> str:
    if not data.rows:
        return ""
    head = "".join(f"<th>{escape(str(name))}</th>" for name in data.columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(show(value))}</td>" for value in row) + "</tr>"
        for row in data.rows
    )
    return (
        '<section><h2>Sizes</h2><div class="scroll"><table><thead><tr>'
        f"{head}</tr></thead><tbody>{body}</tbody></table></div></section>"
    )


def _layout(height: int, **changes: Any) -> dict[str, Any]:
    axis = {"gridcolor": "var(--rule)", "linecolor": "var(--rule)", "zeroline": False,
            "automargin": True, "ticks": ""}  # fmt: skip
    base = {
        "height": height,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": "var(--muted)", "size": 13, "family": "system-ui, sans-serif"},
        "margin": {"l": 64, "r": 12, "t": 12, "b": 48},
        "hoverlabel": {"font": {"family": "system-ui, sans-serif"}},
    }
    x, y = changes.pop("xaxis", {}), changes.pop("yaxis", {})
    return base | changes | {"xaxis": axis | x, "yaxis": axis | y}


def _title(text: str) -> dict[str, Any]:
    return {"text": text, "font": {"size": 13}}


def _frontier(data: ReportData) -> dict[str, Any]:
    size, planned = data.opened
    found = opened_measure(data)
    damage = planned if found is None else found.kl
    traces: list[dict[str, Any]] = [
        {"type": "scatter", "mode": "lines", "name": "climb, as planned",
         "x": [s / MIB for s, _ in data.frontier], "y": [d for _, d in data.frontier],
         "line": {"color": "var(--accent)", "width": 2.5},
         "hovertemplate": "%{x:.1f} MiB, %{y:.4g} nats<extra></extra>"}
    ]  # fmt: skip
    for index, name in enumerate(dict.fromkeys(p.series for p in data.measured)):
        points = [p for p in data.measured if p.series == name]
        traces.append(
            {"type": "scatter", "mode": "markers", "name": name,
             "x": [p.bytes / MIB for p in points], "y": [p.kl for p in points],
             "error_y": {"type": "data", "thickness": 1.5, "width": 0,
                         "array": [(p.high or p.kl) - p.kl for p in points],
                         "arrayminus": [p.kl - (p.low or p.kl) for p in points]},
             "marker": {"size": 9, "color": SERIES_COLOURS[index % len(SERIES_COLOURS)],
                        "line": {"color": "var(--card)", "width": 1.5}},
             "hovertemplate": "%{x:.1f} MiB, %{y:.4g} nats<extra>" + escape(name) + "</extra>"}
        )  # fmt: skip
    traces.append(
        {"type": "scatter", "mode": "markers", "name": f"open, {format_size(size)}",
         "x": [size / MIB], "y": [damage],
         "marker": {"size": 15, "symbol": "circle-open", "color": "var(--ink)",
                    "line": {"width": 2.5}},
         "hovertemplate": "open: %{x:.1f} MiB, %{y:.4g} nats<extra></extra>"}
    )  # fmt: skip
    positive = all(d > 0 for _, d in data.frontier) and all(p.kl > 0 for p in data.measured)
    layout = _layout(
        420,
        xaxis={"title": _title("weights, MiB"), "showgrid": False},
        yaxis={
            "title": _title("damage, nats a token"),
            "type": "log" if positive else "linear",
            "dtick": 1 if positive else None,
            "exponentformat": "none",
        },
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        shapes=[{"type": "line", "x0": size / MIB, "x1": size / MIB, "yref": "paper", "y0": 0,
                 "y1": 1, "line": {"color": "var(--muted)", "dash": "dot", "width": 1.5}}],
        hovermode="closest",
    )  # fmt: skip
    return {"data": traces, "layout": layout}


def _scale(data: ReportData) -> dict[str, Any]:
    low, high = grid_of(data.allocation).limits
    steps = [[i / (len(BITS_SCALE) - 1), colour] for i, colour in enumerate(BITS_SCALE)]
    return {"type": "heatmap", "colorscale": steps, "zmin": low, "zmax": high, "xgap": 1, "ygap": 1}


def _heatmap(data: ReportData) -> dict[str, Any]:
    grid = grid_of(data.allocation)
    trace = _scale(data) | {
        "x": grid.blocks,
        "y": grid.roles,
        "z": grid.bits,
        "colorbar": {"title": _title("bits"), "thickness": 12, "outlinewidth": 0, "x": 1.01},
        "hovertemplate": "block %{x}, %{y}: %{z:.2f} bits<extra></extra>",
    }
    layout = _layout(
        90 + 34 * max(4, len(grid.roles)),
        xaxis={"title": _title("block"), "showgrid": False},
        yaxis={"autorange": "reversed", "showgrid": False, "type": "category"},
    )
    return {"data": [trace], "layout": layout}


def _strip(data: ReportData, role: str) -> dict[str, Any]:
    bits = grid_of(data.allocation).strips[role]
    trace = _scale(data) | {
        "x": list(range(1, len(bits) + 1)),
        "y": [role],
        "z": [bits],
        "showscale": False,
        "text": [[f"{b:.1f}" for b in bits]],
        "texttemplate": "%{text}",
        "hovertemplate": "slice %{x}: %{z:.2f} bits<extra></extra>",
    }
    layout = _layout(
        120,
        xaxis={"title": _title(f"slice of the {role}'s rows"), "showgrid": False, "dtick": 1},
        yaxis={"showgrid": False, "type": "category"},
    )
    return {"data": [trace], "layout": layout}
