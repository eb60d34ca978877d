"""Arguments that more than one verb has, and the words that explain them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(help="A Hugging Face directory, a hub id, a .gguf file, or smollm2.",
                   show_default=False),
]  # fmt: skip
Directory = Annotated[
    Path, typer.Argument(help="An artifact: a directory that fit wrote.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")]
Memory = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Open at this total: weights, KV cache and activations."),
]
Weights = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Open at this many bytes of weights alone.")
]
Device = Annotated[
    str, typer.Option(metavar="auto|cpu|cuda", help="Where the model is put and runs.")
]
Context = Annotated[
    int | None, typer.Option(metavar="TOKENS", help="Longest sequence. [default: as fitted]")
]
TopH = Annotated[
    float, typer.Option(help="Draw from the likeliest that have this share of the entropy.")
]
NoSpeed = Annotated[
    bool,
    typer.Option("--no-speed", help="Do not predict tokens a second, nor time products for it."),
]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run model code that the checkpoint brings.")
]
