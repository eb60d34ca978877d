"""`pliant inspect`: what an artifact holds."""

from __future__ import annotations

from collections import defaultdict
from typing import Annotated, Any

import typer
from rich.table import Table

from pliant.budget import format_size
from pliant.cli.console import Stages, budget_table, loading, nats, print_json, stdout, table
from pliant.cli.options import Directory, Json, Memory, NoSpeed, Weights


def inspect(
    directory: Directory,
    memory: Memory = None,
    weights: Weights = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte and check it.")] = False,
    no_speed: NoSpeed = False,
    as_json: Json = False,
) -> None:
    """Show an artifact's rungs, its climb, and what each layer gets at a size."""
    with loading():
        from pliant.api import inspect as inspect_artifact
    with Stages() as stages:
        found = inspect_artifact(
            directory, memory, weights, verify=verify, timed=not no_speed,
            progress=lambda done, of: stages("timing products", done, of),
        )  # fmt: skip
    if as_json:
        print_json(found)
        return
    console = stdout()
    console.print(
        f"{len(found['rungs']):,} targets, {sum(map(len, found['rungs'].values())):,} rungs, "
        f"{found['steps']:,} steps: weights from {format_size(found['smallest_bytes'])} to "
        f"{format_size(found['largest_bytes'])}" + (", every byte checked" if verify else "")
    )
    console.print(
        f"opens with {format_size(found['weight_bytes'])} of weights, {found['bits']:.2f} bits "
        f"each, predicted damage {nats(found['damage'])}{_pace(found['tokens_per_second'])}\n"
    )
    total = found["memory"] or found["planned_bytes"]
    for part in (budget_table(found["breakdown"], total), _rungs(found), _climb(found),
                  _allocation(found["allocation"])):  # fmt: skip
        console.print(part)
        console.print()


def _rungs(found: dict[str, Any]) -> Table:
    """Rungs by method and options: how many targets have one, how many use it now."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for own in found["rungs"].values():
        for rung in own:
            counts[_name(rung)][0] += 1
    for cell in found["allocation"]:
        counts[_name(cell)][1] += 1
        counts[_name(cell)][2] += cell["nbytes"]
    rows = table("rung", "stored", "open", "bytes open")
    for name, (stored, used, size) in sorted(counts.items()):
        rows.add_row(name, f"{stored:,}", f"{used:,}", format_size(size))
    return rows


def _name(rung: dict[str, Any]) -> str:
    options = " ".join(f"{key}={value}" for key, value in rung["options"].items())
    return f"{rung['method']} {options}".strip()


def _climb(found: dict[str, Any]) -> Table:
    timed = any(point["tokens_per_second"] for point in found["climb"])
    speed = ["predicted tokens/s"] * timed
    rows = table("weights", "bits", "predicted damage", *speed, left=0)
    for point in found["climb"]:
        pace = point["tokens_per_second"]
        rows.add_row(
            format_size(point["weight_bytes"]), f"{point['bits']:.2f}", f"{point['damage']:.4g}",
            *["" if pace is None else f"{pace:,.1f}"] * timed,
        )  # fmt: skip
    return rows


def _pace(speed: float | None) -> str:
    return "" if speed is None else f", {speed:,.1f} tokens/s"


def _allocation(cells: list[dict[str, Any]]) -> Table:
    """Bits a weight by layer and role; experts and slices of one role together."""
    sums: dict[tuple[Any, str], list[int]] = defaultdict(lambda: [0, 0])
    for cell in cells:
        found = sums[cell["block"], cell["role"]]
        found[0] += cell["nbytes"]
        found[1] += cell["numbers"]
    inside = list(dict.fromkeys(role for block, role in sums if block is not None))
    rows = table("layer", *inside)
    outside = {role: sums[block, role] for block, role in sums if block is None}
    for block in sorted({b for b, _ in sums if b is not None}):
        row = [sums.get((block, role)) for role in inside]
        rows.add_row(str(block), *(_bits(pair) for pair in row))
    for role, pair in outside.items():
        rows.add_row(role, _bits(pair))
    return rows


def _bits(pair: list[int] | None) -> str:
    return "" if pair is None else f"{8 * pair[0] / pair[1]:.2f}"
