"""Finished shards become an artifact's: linked, or copied where much of one is left out."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TypeVar

from pliant.errors import PliantError
from pliant.ladder.output import link
from pliant.ladder.rung import Ladder, Rung
from pliant.ladder.shard import Extent, ShardInfo, copy_extents, sync

_THREADS = min(16, os.cpu_count() or 1)
# Share of a shard that may be rungs which the ladder leaves out: copying the rest would write, and
# for a while hold, the artifact twice.
_UNUSED = 0.1
T = TypeVar("T")


@dataclass
class Finished:
    """One shard that was written, and what is in it."""

    info: ShardInfo
    rungs: tuple[Rung, ...] = ()
    fixed: Extent | None = None

    def extents(self) -> list[Extent]:
        own = [rung.where for rung in self.rungs]
        return own if self.fixed is None else [self.fixed, *own]


@dataclass(frozen=True)
class Placement:
    """What a ladder keeps of one shard: rungs in their order on disk."""

    shard: str
    finished: Finished
    rungs: tuple[Rung, ...]

    @property
    def whole(self) -> bool:
        """Whether its file is taken as it is: little in it is left out."""
        kept = sum(rung.nbytes for rung in self.rungs)
        return kept >= (1 - _UNUSED) * sum(rung.nbytes for rung in self.finished.rungs)

    @property
    def nbytes(self) -> int:
        """Bytes that are written anew."""
        return 0 if self.whole else sum(rung.nbytes for rung in self.rungs)

    def place(self, directory: Path, stage: Path, stop: Event) -> tuple[ShardInfo, list[Rung]]:
        """Bring the shard from `directory` to `stage`; the rungs say where they are then."""
        if self.whole:
            link(directory / self.shard, stage / self.shard)
            sync(stage / self.shard)
            return self.finished.info, list(self.rungs)
        info, extents = copy_extents(
            directory, [rung.where for rung in self.rungs], stage / self.shard, stop
        )
        return info, [
            dataclasses.replace(rung, where=where)
            for rung, where in zip(self.rungs, extents, strict=True)
        ]


def placements(ladder: Ladder, shards: Mapping[str, Finished]) -> list[Placement]:
    """What goes into an artifact of `ladder`; shards of which nothing is kept are left out."""
    kept: dict[str, list[Rung]] = {}
    for rungs in ladder.rungs.values():
        for rung in rungs:
            kept.setdefault(rung.where.shard, []).append(rung)
    found = []
    for name, finished in sorted(shards.items()):
        chosen = sorted(kept.pop(name, []), key=lambda rung: rung.where.start)
        if chosen or finished.fixed is not None:
            found.append(Placement(name, finished, tuple(chosen)))
    if kept:
        raise PliantError(f"the ladder has rungs in shards never written: {', '.join(kept)}")
    return found


def place(
    ladder: Ladder, chosen: Sequence[Placement], directory: Path, stage: Path
) -> tuple[dict[str, tuple[Rung, ...]], dict[str, ShardInfo]]:
    """Bring all of `chosen` to `stage`, several at a time: the ladder's rungs where they are then.

    A copy takes a MiB of memory, so that the number of threads follows from the cores alone.
    """
    done = _side_by_side([own.place for own in chosen], directory, stage)
    shards = {own.shard: info for own, (info, _) in zip(chosen, done, strict=True)}
    placed = {(rung.target, rung.index): rung for _, rungs in done for rung in rungs}
    return {
        target: tuple(placed[target, rung.index] for rung in rungs)
        for target, rungs in sorted(ladder.rungs.items())
    }, shards


def _side_by_side(
    jobs: Sequence[Callable[[Path, Path, Event], T]], directory: Path, stage: Path
) -> list[T]:
    """What each job returns. The first error, or an interruption, ends the others at once."""
    stop = Event()
    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            futures = [pool.submit(job, directory, stage, stop) for job in jobs]
            done = wait(futures, return_when=FIRST_EXCEPTION).done
            for future in futures:
                if future in done:
                    future.result()
            return [future.result() for future in futures]
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
