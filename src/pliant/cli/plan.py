"""`pliant plan`: what would fit, from the configuration alone."""

from __future__ import annotations

from typing import Annotated

import typer

from pliant.cli.console import Stages, loading, print_json, stdout
from pliant.cli.options import Json, Model, NoSpeed


def plan(
    model: Model,
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="The budget. [default: what this machine has free]"),
    ] = None,
    context: Annotated[int, typer.Option(metavar="TOKENS", help="Longest sequence.")] = 2048,
    batch: Annotated[int, typer.Option(help="Sequences that run at once.")] = 1,
    no_speed: NoSpeed = False,
    as_json: Json = False,
) -> None:
    """Show what of MODEL fits where, without reading a weight."""
    with loading():
        from pliant.api import plan as plan_model
        from pliant.plan import render
    with Stages() as stages:
        table = plan_model(
            model, memory, context=context, batch=batch, timed=not no_speed,
            progress=lambda done, of: stages("timing products", done, of),
        )  # fmt: skip
    if as_json:
        print_json(table.as_dict())
    else:
        stdout().print(render(table))
