"""Printing: JSON on stdout, progress on stderr, sizes as bars."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from pliant.budget import format_size

PARTS = {"weights": "Weights", "embeddings": "Embeddings", "kv_cache": "KV cache",
         "activations": "Activations", "free": "Free"}  # fmt: skip
_BAR = 28


def stdout() -> Console:
    return Console(highlight=False)


def stderr() -> Console:
    return Console(stderr=True, highlight=False)


def print_json(found: Mapping[str, Any]) -> None:
    print(json.dumps(found, allow_nan=False))


@contextmanager
def loading() -> Iterator[None]:
    """Around a verb's imports; after them no bars and notices of transformers: only Pliant speaks.

    They leave next to no garbage, and looking for it takes a fifth of their time; what they made
    is not looked through later either, until `main` ends.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    finally:
        gc.freeze()
        if collects:
            gc.enable()


class Stages:
    """A bar with the time left for each stage; plain lines where stderr is no terminal."""

    def __init__(self) -> None:
        self._console = stderr()
        self._tasks: dict[str, TaskID] = {}
        self._began: dict[str, float] = {}
        self._ended: set[str] = set()
        self._progress = Progress(
            TextColumn("{task.description:<16}"),
            BarColumn(_BAR),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self._console,
            disable=not self._console.is_terminal,
        )

    def __enter__(self) -> Stages:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def __call__(self, stage: str, done: int, of: int) -> None:
        """Stage `stage` has finished `done` of its `of` steps."""
        if self._console.is_terminal:
            if stage not in self._tasks:
                self._tasks[stage] = self._progress.add_task(stage, total=of, completed=done)
            self._progress.update(self._tasks[stage], total=of, completed=done)
            return
        if stage not in self._began:
            self._began[stage] = time.monotonic()
            if done < of:
                print(f"{stage} ...", file=self._console.file, flush=True)
        if done >= of and stage not in self._ended:
            self._ended.add(stage)
            took = time.monotonic() - self._began[stage]
            print(f"{stage}: {of} of {of}, {took:.0f} s", file=self._console.file, flush=True)


def budget_table(breakdown: Mapping[str, int], total: int) -> Table:
    """Where a budget's bytes go, with each part's share of it."""
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    for justify in ("left", "right", "right", "left"):
        table.add_column(justify=justify)  # type: ignore[arg-type]
    for part, name in PARTS.items():
        share = breakdown[part] / total if total else 0.0
        bar = "█" * round(share * _BAR)
        table.add_row(name, format_size(breakdown[part]), f"{share:.1%}", bar,
                      style="dim" if part == "free" else None)  # fmt: skip
    return table


def table(*titles: str, left: int = 1) -> Table:
    """An empty table of these columns, the first `left` of them of words."""
    made = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for place, title in enumerate(titles):
        made.add_column(title, justify="left" if place < left else "right")
    return made


def nats(damage: float | None) -> str:
    return "unknown" if damage is None else f"{damage:.3g} nats a token"
