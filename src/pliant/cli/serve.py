"""`pliant serve`: the OpenAI API over an artifact, inside a memory budget."""

from __future__ import annotations

import sys
from importlib.util import find_spec
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
        int, typer.Option(min=1, help="Sequences that the KV cache holds; several run together.")
    ] = 1,
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
        from pliant.run import load
        from pliant.serve.batching import BatchingEngine
        from pliant.serve.gate import Limits
        from pliant.serve.http import create_app
        from pliant.serve.sequential import SequentialEngine
        from pliant.serve.server import is_loopback, listen, serve, url_of
    with listen(host, port) as listening:
        model = load(directory, memory, weights, context, batch=batch, device=device)
        tokenizer = model.artifact.tokenizer()
        kind = BatchingEngine if batch > 1 else SequentialEngine
        limits = Limits(body_bytes, time_limit, tuple(key for key in api_key or () if key))
        name = name or directory.resolve().name
        app = create_app(kind(model, tokenizer), name, limits, cors or ())
        url, plan = url_of(listening), model.plan
        if as_json:
            print_json({"url": url, "name": name, "context": plan.context,
                        "weight_bytes": plan.weight_bytes, "planned_bytes": plan.planned_bytes}
            )  # fmt: skip
            sys.stdout.flush()
        else:
            size, held = format_size(plan.planned_bytes), format_size(plan.weight_bytes)
            _say(f"{name}: {size} in all, {held} of it weights, for a context of {plan.context:,}")
            _say(f"serving {url}/v1")
        if not limits.keys and not is_loopback(listening):
            _say("warning: anyone who can reach this address can use it; --api-key asks for a key")
        serve(app, listening)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
