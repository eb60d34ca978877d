"""`pliant cache`: what a KV cache of fewer bits would cost, measured and kept with the artifact."""

from __future__ import annotations

from typing import Annotated

import typer

from pliant.cli.console import Stages, loading, print_json, stdout
from pliant.cli.options import Directory, Json


def cache(
    directory: Directory,
    text: Annotated[
        str,
        typer.Option(metavar="FILE", help="Text to measure on: a file, or a data set's name.",
                     show_default=False),
    ],
    windows: Annotated[int, typer.Option(min=1, help="Windows of text.")] = 4,
    window: Annotated[int, typer.Option(min=64, metavar="TOKENS", help="Length of one.")] = 512,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Measure the damage of each width of DIR's KV cache, which `pliant serve` plans with.

    `fit` does it too, on its own text; this is for artifacts that have no such measurement, or to
    use another text.
    """
    with loading():
        from pliant.fit.cache import measure_cache
        from pliant.ladder import Artifact
        from pliant.measure import load_text
        from pliant.observe import choose_windows
        from pliant.observe import windows as cut
        from pliant.run import load
    with Stages() as stages:
        artifact = Artifact.open(directory)
        found = cut(load_text(text), artifact.tokenizer(), window)
        ids = choose_windows(found, windows, seed=0)
        record = measure_cache(
            load(directory, weights=artifact.ladder.largest_bytes), ids, text,
            progress=lambda done, of: stages("measuring", done, of),
        )  # fmt: skip
    if as_json:
        print_json(record.model_dump())
        return
    for bits, damage in sorted(record.damage.items(), reverse=True):
        stdout().print(f"{bits} bits  {damage:.5f} nats a token")
