"""`pliant bench`: how fast this machine is at products and at whole models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pliant.budget import format_size
from pliant.cli.console import Stages, loading, print_json, stdout, table
from pliant.cli.options import Json


def bench(
    directory: Annotated[
        Path | None,
        typer.Argument(help="An artifact; without one, products of the common codes are timed.",
                       show_default=False),
    ] = None,
    memory: Annotated[
        list[str] | None,
        typer.Option(metavar="SIZE", help="Open at this total; give it again for more sizes. "
                     "[default: the smallest size, a middle one and the largest]"),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(metavar="SIZE", help="Open at this many bytes of weights alone; as often."),
    ] = None,
    device: Annotated[
        str, typer.Option(metavar="auto|cpu|cuda", help="Where to compute.")
    ] = "auto",
    fast: Annotated[
        bool, typer.Option("--quick", help="Less of everything: a few seconds.")
    ] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Time products, or an artifact's tokens, beside what this machine's memory reads."""
    with loading():
        from pliant.api import bench as bench_speed
    with Stages() as stages:
        found = bench_speed(
            directory, memory or (), weights or (), device=device, quick=fast, progress=stages
        )
    if as_json:
        print_json(found)
    elif directory is None:
        _show_products(found)
    else:
        _show_sizes(found)


def _show_products(found: dict[str, Any]) -> None:
    rows = table("code", "shape", "batch", "bits", "us", "GB/s", "of the memory's", left=2)
    for row in found["rows"]:
        rows.add_row(
            row["code"], "{} x {}".format(*row["shape"]), str(row["batch"]), f"{row['bits']:.2f}",
            f"{row['seconds'] * 1e6:,.0f}", _rate(row), f"{row['share']:.1%}",
        )  # fmt: skip
    console = stdout()
    console.print(rows)
    console.print(f"\n{_memory(found)}. GB/s are of the code's bytes, read once a product.")


def _show_sizes(found: dict[str, Any]) -> None:
    rows = table(
        "weights", "decode tokens/s", "predicted", "prefill tokens/s", "bytes a token", "GB/s",
        "of the memory's", left=0,
    )  # fmt: skip
    for row in found["rows"]:
        predicted = row["predicted_tps"]
        rows.add_row(
            format_size(row["weight_bytes"]), f"{row['decode_tps']:,.1f}",
            "" if predicted is None else f"{predicted:,.1f}", f"{row['prefill_tps']:,.1f}",
            format_size(round(row["token_bytes"])), _rate(row), f"{row['share']:.1%}",
        )  # fmt: skip
    console = stdout()
    console.print(rows)
    console.print(
        f"\n{_memory(found)}. {found['new_tokens']} tokens written after "
        f"{found['prompt_tokens']}, one sequence."
    )


def _rate(row: dict[str, Any]) -> str:
    return f"{row['bytes_per_second'] / 1e9:,.2f}"


def _memory(found: dict[str, Any]) -> str:
    return f"{found['device']}; memory reads {found['read_bytes_per_second'] / 1e9:,.1f} GB/s"
