"""`pliant run`: one prompt, one answer."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from pliant.cli.console import loading, print_json
from pliant.cli.options import Context, Device, Directory, Json, Memory, TopH, Weights


def run(
    directory: Directory,
    prompt: Annotated[str, typer.Argument(help="What to ask; - reads it from stdin.")],
    memory: Memory = None,
    weights: Weights = None,
    context: Context = None,
    device: Device = "cpu",
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest of this mass.")] = 1.0,
    top_h: TopH = 1.0,
    seed: Annotated[int | None, typer.Option(help="Of the draws.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt; do not make a chat of it.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Stream an answer to PROMPT."""
    with loading():
        from pliant.run import Usage, load, stream
    model = load(directory, memory, weights, context, device=device)
    usage = Usage()
    pieces = stream(
        model,
        model.artifact.tokenizer(),
        sys.stdin.read() if prompt == "-" else prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_h=top_h,
        seed=seed,
        raw=raw,
        usage=usage,
    )
    if as_json:
        print_json(
            {"text": "".join(pieces)} | usage_dict(usage)
            | {"weight_bytes": model.plan.weight_bytes,
               "planned_bytes": model.plan.planned_bytes}
        )  # fmt: skip
        return
    for piece in pieces:
        print(piece, end="", flush=True)
    print(flush=True)
    print(usage_line(usage), file=sys.stderr)


def usage_dict(usage: object) -> dict[str, object]:
    """Counts and speeds of an answer, JSON-able."""
    names = ("prompt_tokens", "cached_tokens", "new_tokens", "finish", "prefill_tps", "decode_tps")
    return {name: getattr(usage, name) for name in names}


def usage_line(usage: object) -> str:
    found = usage_dict(usage)
    return (
        f"{found['prompt_tokens']} tokens read at {found['prefill_tps']:.1f} tokens/s, "
        f"{found['new_tokens']} written at {found['decode_tps']:.1f} tokens/s"
    )
