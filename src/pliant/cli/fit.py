"""`pliant fit`: squeeze a model into a budget."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pliant.budget import format_size
from pliant.cli.console import Stages, budget_table, loading, nats, print_json, stdout
from pliant.cli.options import Json, Model, Trust

if TYPE_CHECKING:
    from pliant.fit import FitResult


def fit(
    model: Model,
    memory: Annotated[
        str,
        typer.Option(metavar="SIZE", help="What the running model may hold in all, as 128MiB.",
                     show_default=False),
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="DIR", help="Where the artifact goes."),
    ] = None,
    context: Annotated[int, typer.Option(metavar="TOKENS", help="Longest sequence.")] = 2048,
    batch: Annotated[int, typer.Option(help="Sequences that run at once.")] = 1,
    text: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Calibration text: a file, or a data set's name. "
                     "[default: the model writes its own]"),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="YAML that forces methods and options on targets."),
    ] = None,
    effort: Annotated[
        str, typer.Option(metavar="quick|balanced|best", help="How much work to put into it.")
    ] = "balanced",
    device: Annotated[
        str, typer.Option(metavar="auto|cpu|cuda", help="Where to compute.")
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan; write nothing.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the artifact at DIR.")
    ] = False,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Squeeze MODEL into a memory budget and write the artifact.

    The artifact opens at any size from its smallest to its largest. Ctrl-C, then the same
    command, goes on where it was.
    """
    with loading():
        from pliant.api import fit as fit_model
    with Stages() as stages:
        found = fit_model(
            model,
            memory,
            output,
            context=context,
            batch=batch,
            text=text,
            recipe=recipe,
            effort=effort,
            device=device,
            seed=seed,
            dry_run=dry_run,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            progress=stages,
        )
    if as_json:
        print_json(found.as_dict())
    else:
        _show(found, model, context, batch)


def _show(found: FitResult, model: str, context: int, batch: int) -> None:
    console = stdout()
    weights = found.breakdown.weights + found.breakdown.embeddings
    console.print(
        f"[bold]{format_size(found.budget_bytes)}[/] for a context of {context:,} and a batch of "
        f"{batch}: {format_size(found.planned_bytes)} planned"
    )
    console.print()
    console.print(budget_table(found.breakdown.as_dict(), found.budget_bytes))
    console.print()
    console.print(
        f"{found.bits:.2f} bits a weight: {format_size(weights)} of "
        f"{format_size(found.original_bytes)}"
    )
    if found.damage is not None:
        console.print(f"predicted damage: {nats(found.damage)}")
    console.print(
        f"{found.rungs:,} rungs of {found.targets:,} targets: weights from "
        f"{format_size(found.smallest_bytes)} to {format_size(found.largest_bytes)}"
    )
    if found.note:
        console.print(f"note: {found.note}", markup=False)
    if found.path is None:
        console.print("\nnothing was written; the sizes are estimates", style="dim")
        return
    out = shlex.quote(str(found.path))
    console.print(
        f'\npliant run {out} "What is a budget?"\n'
        f"pliant measure {out} --against {shlex.quote(model)} --text FILE\n"
        f"pliant report {out}",
        style="dim", markup=False, soft_wrap=True,
    )  # fmt: skip
