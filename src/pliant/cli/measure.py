"""`pliant measure`: what compression cost."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pliant.budget import format_size
from pliant.cli.console import Stages, loading, print_json, stdout
from pliant.cli.options import Json, Memory, Trust, Weights


def measure(
    model: Annotated[str, typer.Argument(help="An artifact's directory, or a model as for fit.")],
    against: Annotated[
        str, typer.Option(metavar="MODEL", help="The original.", show_default=False)
    ],
    text: Annotated[
        str,
        typer.Option(metavar="FILE", help="Text to score: a file, or a data set's name.",
                     show_default=False),
    ],
    window: Annotated[int, typer.Option(metavar="TOKENS", help="Length of a window.")] = 512,
    score: Annotated[
        str, typer.Option(metavar="half|all", help="Score the second half of a window, or all.")
    ] = "half",
    limit: Annotated[
        int | None, typer.Option(metavar="WINDOWS", help="At most so many. [default: all]")
    ] = None,
    part: Annotated[
        str,
        typer.Option(metavar="all|evaluation|calibration",
                     help="All of the text, its first 60%, or its last 30%."),
    ] = "all",
    memory: Memory = None,
    weights: Weights = None,
    no_speed: Annotated[
        bool, typer.Option("--no-speed", help="Leave tokens a second out.")
    ] = False,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Compare MODEL with the original on a text: damage, perplexity, agreement, bytes, speed."""
    from pathlib import Path

    with loading():
        from pliant.api import measure as measure_model
    with Stages() as stages:
        found = measure_model(
            model,
            against,
            Path(text),
            window=window,
            score=score,  # type: ignore[arg-type]
            part=part,  # type: ignore[arg-type]
            limit=limit,
            memory=memory,
            weights=weights,
            timed=not no_speed,
            trust_remote_code=trust_remote_code,
            progress=lambda done, of: stages("measuring", done, of),
        )
    if as_json:
        print_json(found)
    else:
        _show(found)


def _show(found: dict[str, Any]) -> None:
    low, high = found["kl_ci95"]
    lines = [
        ("damage", f"{found['kl']:.4g} nats a token, 95% between {low:.4g} and {high:.4g}"),
        ("perplexity",
         f"{found['perplexity']:.3f}, the original's {found['perplexity_original']:.3f}"),
        ("top-1 agreement", f"{found['top1']:.1%}"),
        ("weights", format_size(found["weight_bytes"])),
        ("scored", f"{found['tokens']:,} tokens in {found['windows']} windows of "
                   f"{found['window']}, {found['score']} of each"),
    ]  # fmt: skip
    if found["decode_tps"] is not None:
        pace = f"{found['prefill_tps']:.1f} tokens/s read, {found['decode_tps']:.1f} written"
        lines.append(("speed", pace))
    console = stdout()
    for name, value in lines:
        console.print(f"{name:<16} {value}", soft_wrap=True)
