"""`pliant`: its verbs, and what a mistake looks like."""

from __future__ import annotations

import gc
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import pliant
from pliant.cli.bench import bench
from pliant.cli.cache import cache
from pliant.cli.chat import chat
from pliant.cli.fit import fit
from pliant.cli.inspect import inspect
from pliant.cli.measure import measure
from pliant.cli.methods import methods
from pliant.cli.plan import plan
from pliant.cli.report import report
from pliant.cli.run import run
from pliant.cli.serve import serve
from pliant.errors import PliantError

INTERRUPTED = 130
_RESUMABLE = "interrupted; run the same command again to go on"


class Interrupted(Exception):
    """Ctrl-C in a verb; each version of typer would make something else of it."""


class _Verbs(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            resumable = ctx.invoked_subcommand == "fit"
            raise Interrupted(_RESUMABLE if resumable else "interrupted") from None


app = typer.Typer(
    cls=_Verbs,
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _verb in (fit, run, chat, serve, plan, measure, cache, inspect, bench, methods, report):
    app.command()(_verb)


@app.callback()
def pliant_(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Fit a language model into a memory budget, run it, and resize it live."""
    if version:
        print(f"pliant {pliant.__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; its exit status."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    command = typer.main.get_command(app)
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            status = command.main(given, prog_name="pliant", standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except PliantError as error:
        return _say(f"error: {_one_line(error)}", error.exit_code)
    except Interrupted as interrupted:
        return _say(f"\n{interrupted}", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        found = getattr(error, "ctx", None)
        path = found.command_path if found is not None else "pliant"
        return _say(f"error: {error.format_message()} (see {path} --help)", 2)
    finally:
        gc.unfreeze()


def _one_line(error: Exception) -> str:
    """Messages of other libraries, which ours may quote, can have many."""
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip())


def _say(text: str, status: int) -> int:
    print(text, file=sys.stderr)
    return status
