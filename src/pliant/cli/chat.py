"""`pliant chat`: a conversation, in which the model's memory can be changed."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pliant.budget import format_size
from pliant.cli.console import loading, print_json
from pliant.cli.options import Context, Device, Directory, Json, Memory, TopH, Weights
from pliant.cli.run import usage_dict, usage_line
from pliant.errors import PliantError

if TYPE_CHECKING:
    from pliant.run import Chat

HELP = "/memory SIZE, /weights SIZE resize the model; /reset forgets; /quit ends"


def chat(
    directory: Directory,
    memory: Memory = None,
    weights: Weights = None,
    context: Context = None,
    device: Device = "cpu",
    system: Annotated[str | None, typer.Option(help="Instructions that come first.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest of this mass.")] = 1.0,
    top_h: TopH = 1.0,
    seed: Annotated[int | None, typer.Option(help="Of the draws.")] = None,
    as_json: Json = False,
) -> None:
    """Talk to an artifact. /memory SIZE resizes it while it runs; /reset, /quit, /help."""
    with loading():
        from pliant.run import Chat, load
    model = load(directory, memory, weights, context, device=device)
    conversation = Chat(
        model,
        model.artifact.tokenizer(),
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_h=top_h,
        seed=seed,
    )
    interactive = sys.stdin.isatty() and not as_json
    if interactive:
        with suppress(ImportError):
            import readline  # noqa: F401  (line editing for input)
        _say(_size(model))
        _say(HELP)
    while (line := _line(interactive)) is not None:
        if line.startswith("/"):
            if not _command(line, conversation):
                break
        elif line.strip():
            _answer(conversation, line, as_json)
    if as_json:
        print_json(
            {"messages": conversation.history, "usage": usage_dict(conversation.usage),
             "weight_bytes": model.plan.weight_bytes, "planned_bytes": model.plan.planned_bytes}
        )  # fmt: skip


def _line(interactive: bool) -> str | None:
    """The next line, None at the end."""
    if interactive:
        try:
            return input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return None
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None


def _answer(conversation: Chat, line: str, silent: bool) -> None:
    """Stream the answer; Ctrl-C breaks it off and the conversation goes on."""
    try:
        pieces = conversation.send(line)
    except PliantError as error:
        _say(f"error: {error}")
        return
    try:
        for piece in pieces:
            if not silent:
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        pieces.close()  # type: ignore[attr-defined]
    if not silent:
        print(flush=True)
        _say(usage_line(conversation.usage))


def _command(line: str, conversation: Chat) -> bool:
    """Do what a line with a slash says; False ends the conversation."""
    name, _, value = line.strip().partition(" ")
    if name in ("/quit", "/exit"):
        return False
    if name == "/reset":
        conversation.clear()
        _say("forgotten")
    elif name in ("/memory", "/weights"):
        try:
            if value.strip():
                conversation.model.resize(**{name[1:]: value.strip()})
            _say(_size(conversation.model))
        except PliantError as error:
            _say(f"error: {error}")
    else:
        _say(HELP)
    return True


def _size(model: Any) -> str:
    plan = model.plan
    return (
        f"{format_size(plan.planned_bytes)} in all, {format_size(plan.weight_bytes)} of it "
        f"weights, for a context of {plan.context:,}"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
