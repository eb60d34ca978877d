"""The shapes that the package ships for the CUDA decode kernel, from what was timed on a GPU.

    python bench/shapes.py KERNELS.json ... [--out src/pliant/kernels/cuda/shapes.json]

Reads what bench/kernels.py wrote, later files over earlier ones, and keeps other GPUs' rows of the
file that is there. Then says how much slower than the best that was timed the choice is: of each
product from its own row, from the table without it (leave one out) or without any product of its
height and length (the formula's, where all others are far), and by the formula. Needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pliant.kernels.cuda import shapes
from pliant.kernels.cuda.decode import Shape
from pliant.kernels.cuda.shapes import Case, Gpu, Measured, Table

_NAME = re.compile(r"decode (int|levels)(\d) (\d+)x(\d+)(?P<packed> g64, 6-bit scales, zeros)?$")
_HOW = re.compile(r"(\d+) warps, (\d+) tiles, (\d+) deep, (\d+) loads")
_KINDS = {"int": "integers", "levels": "levels"}


def measured(name: str, row: dict[str, Any]) -> tuple[Case, dict[str, float]] | None:
    """A row of kernels.json: the product and microseconds by shape; None for other rows.

    A row without its case is from before levels of one digit: "levels" there take two.
    """
    if "case" in row:
        return Case(**row["case"]), row["tried"]
    match, how = _NAME.match(name), _HOW.match(row.get("how", ""))
    if not match or not how:
        return None
    kind, bits, out, width = match.groups()[:4]
    packed = match["packed"] is not None
    case = Case(_KINDS[kind], int(bits), int(out), int(width), 1, 64 if packed else 128, packed)
    pairs = [pair.split("=") for pair in row["next"].split("; ")]
    times = {shape: max(float(took), row["us"]) for shape, took in pairs}  # "us" is a longer run's
    # The quickest of the short runs is not in the list: when another was best, it is the one
    # candidate without a time, which was between the best's and the next one's.
    best = "/".join(how.groups())
    if best in times:
        wanted = map(shapes.written, shapes.candidates(case, 132))
        missing = [s for s in wanted if s not in times and s.split("/")[0] == "8"]
        times |= dict.fromkeys(missing, min(times.values())) if len(missing) == 1 else {}
    return case, {best: row["us"]} | times | {best: row["us"]}


def device_of(content: dict[str, Any]) -> dict[str, Any]:
    known = {"NVIDIA H100 80GB HBM3": ([9, 0], 132), "NVIDIA H200": ([9, 0], 132)}
    capability, count = known.get(content["device"], (None, None))
    return {
        "name": content["device"],
        "capability": content.get("capability", capability),
        "multiprocessors": content.get("multiprocessors", count),
    }


def table(paths: list[Path], before: dict[str, Any]) -> dict[str, Any]:
    """The content of the data file."""
    devices = {d["name"]: d for d in before.get("devices", [])}
    for path in paths:
        content = json.loads(path.read_text())
        device = device_of(content)
        products = {
            json.dumps(p["case"]): p for p in devices.get(device["name"], {}).get("products", [])
        }
        for name, row in content["rows"].items():
            found = measured(name, row)
            if found is not None:
                case, times = found
                us = {s: round(t, 3) for s, t in sorted(times.items(), key=lambda pair: pair[1])}
                products[json.dumps(asdict(case))] = {"case": asdict(case), "us": us}
        devices[device["name"]] = device | {"products": list(products.values())}
    return {"devices": list(devices.values())}


def before_this(case: Case) -> Shape:
    """The formula of before, to compare: eight warps, one block a multiprocessor."""
    return Shape(8, max(1, min(-(-case.out // (16 * 132)), 12)))


def compare(measured_: Table, judged: Table) -> str:
    """Ratios to the best that was timed, by each way to choose, over the products of `judged`."""

    def without(left_out: Callable[[Measured], bool]) -> Table:
        return Table(tuple(row for row in measured_.rows if not left_out(row)))

    ways: dict[str, list[float]] = {}
    lines = []
    for row in judged.rows:
        case, gpu = row.case, Gpu("", row.capability, row.multiprocessors)
        size = (case.out, case.width)
        chosen = {
            "old formula": before_this(case),
            "formula": shapes.formula(case, gpu.multiprocessors),
            "table": measured_.shape(case, gpu),
            "without it": without(lambda r, c=case: r.case == c).shape(case, gpu),
            "without its size": without(lambda r, s=size: (r.case.out, r.case.width) == s).shape(
                case, gpu
            ),
        }
        best = min(row.times.values())
        line = f"{case.kind}, {case.bits} bits, {case.out}x{case.width}{' packed' * case.packed}:"
        for way, shape in chosen.items():
            if shape is None:  # what it would be until tuned
                shape = chosen["formula"]
            took = row.times.get(shape)
            if took is None:
                line += f" {way} {shapes.written(shape)}=?;"
                continue
            ways.setdefault(way, []).append(took / best)
            line += f" {way} {shapes.written(shape)}={took / best:.2f};"
        lines.append(line)
    for way, ratios in ways.items():
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        over = sum(r > 1.1 for r in ratios)
        lines.append(
            f"{way}: geometric mean {mean:.3f}, largest {max(ratios):.2f}, "
            f"{over} of {len(ratios)} over 1.10"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="*")
    parser.add_argument("--out", type=Path, default=Path(shapes.__file__).with_name("shapes.json"))
    parser.add_argument("--judge", type=Path, help="another kernels.json to compare choices on")
    options = parser.parse_args()
    content = refresh(options.files, options.out)
    own = shapes.read_table(content)
    judged = own
    if options.judge:
        judged = shapes.read_table(table([options.judge], {}))
    print(compare(own, judged))


def refresh(files: list[Path], path: Path) -> dict[str, Any]:
    """The content of the data file, with those measurements, and written if there are any."""
    before = json.loads(path.read_text()) if path.exists() else {}
    content = table(files, before)
    if files:
        write(content, path)
    return content


def write(content: dict[str, Any], path: Path) -> None:
    """A product a line."""
    lines = []
    for device in content["devices"]:
        about = json.dumps({k: v for k, v in device.items() if k != "products"})
        rows = ",\n".join(f"   {json.dumps(row)}" for row in device["products"])
        lines.append(f'  {about[:-1]}, "products": [\n{rows}\n  ]}}')
    path.write_text('{"devices": [\n' + ",\n".join(lines) + "\n]}\n")


if __name__ == "__main__":
    main()
