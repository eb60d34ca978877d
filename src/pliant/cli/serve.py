"""`pliant serve`: the OpenAI API over an artifact, inside a memory budget."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from pliant.budget import format_size, parse_size
from pliant.cli.console import loading, print_json
from pliant.cli.options import Context, Device, Directory, Json, Memory, Weights
from pliant.errors import PliantError

_NEEDS = {"fastapi": "fastapi", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client"}


def serve(
    directory: Directory,
    memory: Memory = None,
    weights: Weights = None,
    context: Context = None,
    batch: Annotated[
        int, typer.Option(min=1, help="Requests that run at once, at most; 1: one after another.")
    ] = 16,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(envvar="PLIANT_API_KEY", help="Ask clients for it; give several if you like."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Of the model. [default: the directory's]")
    ] = None,
    device: Device = "cpu",
    cors: Annotated[
        list[str] | None, typer.Option(metavar="ORIGIN", help="A web page that may call it.")
    ] = None,
    max_body: Annotated[str, typer.Option(metavar="SIZE", help="Largest request.")] = "4MiB",
    time_limit: Annotated[float, typer.Option(min=1, help="Seconds for an answer.")] = 600.0,
    share_damage: Annotated[
        float,
        typer.Option(min=0, metavar="NATS", help="Damage a token that running more may add."),
    ] = 0.05,
    swap: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where pages go of requests that give way. [default: they are read again]",
            show_default=False,
        ),
    ] = None,
    follow_cgroup: Annotated[
        bool,
        typer.Option(
            "--follow-cgroup", help="Shrink while this machine's or container's memory is short."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Serve DIR's model as OpenAI's API does; PUT /v1/budget resizes it while it runs."""
    absent = [package for module, package in _NEEDS.items() if find_spec(module) is None]
    if absent:
        raise PliantError(
            f"serve needs {', '.join(absent)}; the extra has it: pip install 'pliant[serve]'"
        )
    body_bytes = parse_size(max_body)
    with loading():
        from pliant.serve.gate import Limits
        from pliant.serve.http import create_app
        from pliant.serve.opening import open_engine
        from pliant.serve.pressure import Watch
        from pliant.serve.server import is_loopback, listen, serve, url_of
    with listen(host, port) as listening:
        engine = open_engine(
            directory, memory, weights, context, most=batch, device=device,
            share_damage=share_damage, swap=swap,
        )  # fmt: skip
        limits = Limits(body_bytes, time_limit, tuple(key for key in api_key or () if key))
        name = name or directory.resolve().name
        watch = Watch(engine, follow_cgroup)
        app = create_app(engine, name, limits, cors or (), watch)
        url, held = url_of(listening), engine.status()
        if as_json:
            print_json({"url": url, "name": name, "context": engine.context,
                        "weight_bytes": held.weights, "planned_bytes": held.planned}
            )  # fmt: skip
            sys.stdout.flush()
        else:
            size, weight = format_size(held.planned), format_size(held.weights)
            _say(f"{name}: {size} in all, {weight} of it weights now; contexts of up to "
                 f"{engine.context:,}")  # fmt: skip
            _say(f"serving {url}/v1")
        if not limits.keys and not is_loopback(listening):
            _say("warning: anyone who can reach this address can use it; --api-key asks for a key")
        serve(app, listening)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
