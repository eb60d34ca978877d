"""`pliant report`: the artifact on one page, with pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pliant.budget import format_size
from pliant.cli.console import Stages, loading, print_json, stdout
from pliant.cli.options import Directory, Json, Memory, NoSpeed, Trust, Weights
from pliant.errors import PliantError

if TYPE_CHECKING:
    from pliant.ladder import Artifact
    from pliant.ladder.live import Plan
    from pliant.measure.report import ReportData

    Speed = Callable[[Mapping[str, int]], float | None]

MEASURED_FILE = "measured.json"
_SIZES = 5


def report(
    directory: Directory,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="OUT", help="[default: DIR-report]"),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The original: measure damage at a few sizes."),
    ] = None,
    text: Annotated[
        str | None, typer.Option(metavar="FILE", help="Text to measure on, with --against.")
    ] = None,
    limit: Annotated[int, typer.Option(metavar="WINDOWS", help="Of 512 tokens each.")] = 8,
    measured: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Measurements made before: JSON of `pliant measure`, "
                     "or an earlier report's measured.json. [default: DIR/measured.json]"),
    ] = None,
    memory: Memory = None,
    weights: Weights = None,
    no_speed: NoSpeed = False,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Write one HTML page and pictures: size and damage, allocation, the memory bar, the table."""
    with loading():
        from pliant.api import decode_speed
        from pliant.ladder import Artifact
        from pliant.ladder.live import plan_opening
        from pliant.measure.report import write_report
    if (against is None) != (text is None):
        raise PliantError("--against MODEL and --text FILE go together; give both or neither")
    artifact = Artifact.open(directory)
    opening = plan_opening(artifact, memory, weights)
    source = directory / MEASURED_FILE if measured is None else measured
    points = read_measured(source) if measured is not None or source.exists() else []
    out = output or directory.with_name(directory.resolve().name + "-report")
    if against is not None and text is not None:
        with Stages() as stages:
            points += measure_sizes(
                artifact, opening, against, text, limit, trust_remote_code, stages
            )
    speed = None
    if not no_speed:
        with Stages() as stages:
            speed = decode_speed(
                artifact, opening, lambda done, of: stages("timing products", done, of)
            )
    data = report_data(artifact, opening, points, title=against, speed=speed)
    paths = write_report(data, out)
    if points:
        (out / MEASURED_FILE).write_text(json.dumps(points, indent=1), encoding="utf-8")
    if as_json:
        print_json({"path": str(out), "files": [str(p) for p in paths], "measured": points})
    else:
        stdout().print(f"{paths[0]}", markup=False, soft_wrap=True)


def read_measured(path: Path) -> list[dict[str, Any]]:
    """Measurements in a file: what `pliant measure --json` printed, or a list of such."""
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PliantError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise PliantError(f"{path} is not JSON: {error}") from error
    if isinstance(given, dict):
        given = given.get("measured", [given])
    points = []
    try:
        for one in given:
            low, high = one.get("kl_ci95") or (one.get("low"), one.get("high"))
            size = one["bytes"] if "bytes" in one else one["weight_bytes"]
            points.append({**one, "bytes": int(size), "kl": float(one["kl"]), "low": low,
                           "high": high, "series": one.get("series", "measured")})  # fmt: skip
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise PliantError(
            f"{path} holds no measurements ({error!r}); each needs weight_bytes, kl and kl_ci95, "
            "as pliant measure --json prints them"
        ) from error
    return points


def measure_sizes(
    artifact: Artifact,
    opening: Plan,
    against: str,
    text: str,
    limit: int,
    trust_remote_code: bool,
    stages: Stages,
) -> list[dict[str, Any]]:
    """Damage at the opened size and at a few others along the climb, on one model, resized."""
    from pliant.api import find, opened
    from pliant.measure import Reference, load_text, windows
    from pliant.run import load

    original = find(against, trust_remote_code)
    ids = windows(load_text(text), original.tokenizer(), limit=limit)
    key = original.fingerprint() if hasattr(original, "fingerprint") else None
    ladder = artifact.ladder
    low, high = ladder.smallest_bytes, ladder.largest_bytes
    sizes = {low + (high - low) * i // (_SIZES - 2) for i in range(_SIZES - 1)}
    sizes.add(opening.weight_bytes)
    reference = Reference.of(
        opened(original), ids, key=key, progress=lambda d, of: stages("the original", d, of)
    )
    model = load(artifact.directory, weights=low)
    points = []
    total = len(ids) * len(sizes)
    for index, size in enumerate(sorted(sizes)):
        model.resize(weights=size)

        def told(done: int, of: int, before: int = index * len(ids)) -> None:
            stages("sizes", before + done, total)

        found = reference.damage(model, progress=told)
        points.append(
            {"bytes": model.plan.weight_bytes, "kl": found.kl, "low": found.kl_ci95[0],
             "high": found.kl_ci95[1], "series": f"measured on {Path(text).name}",
             "perplexity": found.perplexity, "perplexity_original": found.perplexity_original,
             "top1": found.top1, "tokens": found.tokens}
        )  # fmt: skip
    return points


def report_data(
    artifact: Artifact,
    opening: Plan,
    points: list[dict[str, Any]],
    title: str | None = None,
    speed: Speed | None = None,
) -> ReportData:
    """The artifact as plain data, with the sizes that were measured.

    speed: predicts tokens a second of an allocation.
    """
    from pliant.api import allocation, bits_of
    from pliant.measure.report import Cell, Measured, ReportData

    cells = allocation(artifact, opening)
    size = opening.weight_bytes
    return ReportData(
        model=f"{title or artifact.directory.resolve().name} in {format_size(size)}",
        budget=opening.memory,
        context=opening.context,
        batch=opening.batch,
        breakdown=opening.breakdown.as_dict(),
        frontier=list(artifact.ladder.frontier()),
        opened=(size, artifact.ladder.damage_at(size)),
        original_bytes=int(artifact.provenance.get("original_bytes", 0)),
        allocation=[Cell(c["role"], c["block"], c["bits"], c["numbers"]) for c in cells],
        measured=[Measured(p["bytes"], p["kl"], p["low"], p["high"], p["series"]) for p in points],
        facts={"Bits a weight": f"{bits_of(artifact, size):.2f}"} | _decode(speed, opening),
        columns=("weights", "bits", "damage, planned", "damage, measured", "95% interval",
                 "perplexity", "top-1", *["tokens/s, predicted"] * (speed is not None)),
        rows=_rows(artifact, points, size, speed),
        notes="Planned damage is a prediction for the calibration text, which by default the "
        "model wrote itself; on other text it differs.",
    )  # fmt: skip


def _decode(speed: Speed | None, opening: Plan) -> dict[str, str]:
    pace = speed(opening.allocation) if speed else None
    return {} if pace is None else {"Decode": f"{pace:,.1f} tokens/s (predicted)"}


def _rows(
    artifact: Artifact, points: list[dict[str, Any]], opened: int, speed: Speed | None
) -> list[list[Any]]:
    """Measured sizes, and the climb's where none was measured."""
    from pliant.api import bits_of, climb_summary

    sizes = {p["weight_bytes"] for p in climb_summary(artifact)} | {opened}
    rows: dict[int, dict[str, Any]] = {size: {} for size in sizes} if not points else {}
    rows |= {p["bytes"]: p for p in points}
    table = []
    for size, found in sorted(rows.items()):
        low, high, top1 = found.get("low"), found.get("high"), found.get("top1")
        planned = artifact.ladder.damage_at(size)
        table.append(
            [format_size(size) + (" (open)" if size == opened else ""),
             f"{bits_of(artifact, size):.2f}", f"{planned:.3g}",
             f"{found['kl']:.3g}" if "kl" in found else "",
             f"{low:.3g} to {high:.3g}" if low is not None and high is not None else "",
             f"{found['perplexity']:.2f}" if "perplexity" in found else "",
             f"{top1:.1%}" if top1 is not None else ""]
        )  # fmt: skip
        if speed is not None:
            pace = speed(artifact.ladder.allocation(size))
            table[-1].append("" if pace is None else f"{pace:,.1f}")
    return table
