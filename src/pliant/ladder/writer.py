"""Writing an artifact piece by piece, so that an interrupted fit goes on where it stopped.

While it grows it lives in `<out>.partial`: finished shards and `journal.json`, which records each
of them with its checksum. `finish` assembles the artifact beside its final name and renames it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from pliant.codes import Code, from_tensors
from pliant.errors import CorruptError, PliantError
from pliant.ladder import document
from pliant.ladder.held import Held
from pliant.ladder.output import (
    check_output,
    empty,
    length,
    put_in_place,
    recover,
    told_when_full,
    write_file,
)
from pliant.ladder.placing import Finished, place, placements
from pliant.ladder.rung import Ladder, Rung
from pliant.ladder.shard import (
    Extent,
    ShardInfo,
    check_whole,
    read_extent,
    sync,
    write_shard,
)

JOURNAL = "journal.json"
FIXED = "fixed"
_ASSEMBLY = "artifact"


@dataclass(frozen=True)
class Proposal:
    """A code that wants to be a rung."""

    target: str
    method: str
    options: dict[str, Any]
    code: Code
    damage: float = 0.0


@dataclass
class _Journal:
    key: str
    version: int = document.VERSION
    shards: dict[str, Finished] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)


_JOURNALS: TypeAdapter[_Journal] = TypeAdapter(_Journal)


class Writer:
    """Collects shards in `<out>.partial`; one writer at a time for each `out`.

    key: a fingerprint of everything that decides the shards' content (checkpoint, text, recipe,
    seed). Work left by an earlier writer is taken up only when its key is the same. hold: bytes of
    codes, by type of device, that stay in memory once they were written or read (`Held`).
    """

    def __init__(
        self,
        out: str | Path,
        key: str,
        overwrite: bool = False,
        hold: Mapping[str, int] | None = None,
    ) -> None:
        self.out = Path(os.path.abspath(out))
        self.overwrite = overwrite
        self.directory = self.out.with_name(self.out.name + ".partial")
        recover(self.out)
        check_output(self.out, overwrite)
        kept = self._read_journal()
        with told_when_full(self.directory.parent, 0):
            self.directory.mkdir(parents=True, exist_ok=True)
        if kept is None or kept.key != key or kept.version != document.VERSION:
            empty(self.directory)
            kept = _Journal(key)
        self._journal = kept
        self._held = Held(hold or {})
        self._syncing = ThreadPoolExecutor(1)
        self._drop_damaged()
        self._save()

    @property
    def resumed(self) -> bool:
        """Whether finished work of an earlier run was found."""
        return bool(self._journal.shards or self._journal.state)

    def has(self, shard: str) -> bool:
        """Whether `shard` is finished."""
        return _file_name(shard) in self._journal.shards

    def rungs(self, shard: str) -> list[Rung]:
        """The rungs in a finished shard."""
        return list(self._journal.shards[_file_name(shard)].rungs)

    def all_rungs(self, *shards: str) -> dict[str, list[Rung]]:
        """Rungs by target, bytes rising: of `shards`, or of all finished ones."""
        found: dict[str, list[Rung]] = {}
        wanted = {_file_name(shard) for shard in shards}
        for name, finished in sorted(self._journal.shards.items()):
            for rung in finished.rungs if not wanted or name in wanted else ():
                found.setdefault(rung.target, []).append(rung)
        return found

    def write(self, shard: str, proposals: Sequence[Proposal]) -> list[Rung]:
        """Store `proposals` as shard `shard` ("block-00007", "outer"); replaces one of that name.

        The rungs come back grouped by target, bytes rising, numbered from 0.
        """
        by_target: dict[str, list[Proposal]] = {}
        for proposal in proposals:
            by_target.setdefault(proposal.target, []).append(proposal)
        order = [
            (index, proposal)
            for target in sorted(by_target)
            for index, proposal in enumerate(
                sorted(by_target[target], key=lambda p: (p.code.nbytes, p.method))
            )
        ]
        groups = [(f"{p.target}@{index}.", p.code.tensors()) for index, p in order]
        info, extents = self._write(_file_name(shard), groups)
        rungs = tuple(
            Rung(p.target, index, p.method, p.options, p.code.meta(), where.nbytes, p.damage, where)
            for (index, p), where in zip(order, extents, strict=True)
        )
        self._held.forget(_file_name(shard))
        for (_, tensors), where in zip(groups, extents, strict=True):
            self._held.keep(where, tensors)
        self._journal.shards[_file_name(shard)] = Finished(info, rungs)
        self._save()
        return list(rungs)

    def write_fixed(self, tensors: Mapping[str, Tensor]) -> Extent:
        """Store the tensors that every size holds, under their parameter names."""
        info, extents = self._write(_file_name(FIXED), [("", tensors)])
        self._journal.shards[_file_name(FIXED)] = Finished(info, fixed=extents[0])
        self._save()
        return extents[0]

    @property
    def fixed_bytes(self) -> int:
        """Bytes of the fixed tensors; they must have been written."""
        return self._fixed().nbytes

    def load_code(self, rung: Rung) -> Code:
        """The code of a rung in a finished shard; it may share its memory with other calls'."""
        found = self._held.get(rung.where)
        if found is None:
            found = read_extent(self.directory, rung.where)
            self._held.keep(rung.where, found)
        return from_tensors(rung.meta, found)

    def state(self, name: str) -> Any:
        """What `save_state` kept under `name`, in this run or the one it resumes; else None."""
        return self._journal.state.get(name)

    def save_state(self, name: str, value: Any) -> None:
        """Keep a JSON value (measurements) for a run that resumes this one."""
        self._journal.state[name] = value
        self._save()

    def finish(
        self,
        ladder: Ladder,
        *,
        files: Mapping[str, Path | bytes | str],
        targets: Sequence[Mapping[str, Any]] = (),
        budget: Mapping[str, int] | None = None,
        recipe: Mapping[str, Any] | None = None,
        provenance: Mapping[str, Any] | None = None,
        complete: Callable[[Path], None] | None = None,
    ) -> Path:
        """Assemble the artifact and give it its name; the partial work goes.

        ladder: rungs that came from `write`, perhaps fewer, renumbered, with their damage; those
        that it leaves out take at most a tenth of a shard. files: config.json, tokenizer files,
        recipe.yaml ... complete: may open the artifact where it is assembled, and add to it.
        """
        stage = self.directory / _ASSEMBLY
        chosen = placements(ladder, self._journal.shards)
        needed = sum(map(length, files.values())) + sum(own.nbytes for own in chosen)
        self._held.forget()
        try:
            with told_when_full(self.directory, needed):
                shutil.rmtree(stage, ignore_errors=True)
                stage.mkdir()
                rungs, shards = place(ladder, chosen, self.directory, stage)
                made = document.Document(
                    rungs=rungs,
                    climb=ladder.climb,
                    fixed=self._fixed(),
                    shards=shards,
                    start_damage=ladder.start_damage,
                    targets=[dict(target) for target in targets],
                    budget=dict(budget or {}),
                    recipe=dict(recipe or {}),
                    provenance=dict(provenance or {}),
                )
                for name, content in {**files, document.FILE_NAME: document.to_bytes(made)}.items():
                    write_file(stage / name, content)
                if complete is not None:
                    complete(stage)
                sync(stage)
        except BaseException:
            shutil.rmtree(stage, ignore_errors=True)
            raise
        with told_when_full(self.directory, 0):
            put_in_place(stage, self.out, self.overwrite)
        shutil.rmtree(self.directory, ignore_errors=True)
        return self.out

    def discard(self) -> None:
        """Throw the partial work away."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _fixed(self) -> Extent:
        finished = self._journal.shards.get(_file_name(FIXED))
        if finished is None or finished.fixed is None:
            raise PliantError("the fixed tensors have not been written; call write_fixed first")
        return finished.fixed

    def _write(
        self, name: str, groups: Sequence[tuple[str, Mapping[str, Tensor]]]
    ) -> tuple[ShardInfo, list[Extent]]:
        needed = sum(tensor.nbytes for _, tensors in groups for tensor in tensors.values())
        path = self.directory / name
        with told_when_full(self.directory, needed):
            # Not waited for: a shard that a power cut tears fails its checksum and is built again.
            written = write_shard(path, groups, durable=False)
        self._syncing.submit(sync, path)  # so that `finish` need not write all of them at once
        return written

    def _read_journal(self) -> _Journal | None:
        path = self.directory / JOURNAL
        if not self.directory.exists():
            return None
        if not path.exists() and any(self.directory.iterdir()):
            raise PliantError(
                f"{self.directory} is in the way and holds no partial work of Pliant; move it"
            )
        try:
            return _JOURNALS.validate_json(path.read_bytes())
        except (OSError, ValidationError):
            return None

    def _drop_damaged(self) -> None:
        for name, finished in list(self._journal.shards.items()):
            try:
                check_whole(self.directory, name, finished.info, finished.extents())
            except CorruptError:
                del self._journal.shards[name]

    def _save(self) -> None:
        fields = _JOURNALS.dump_python(self._journal, mode="json")
        raw = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
        with told_when_full(self.directory, len(raw)):
            temporary = self.directory / (JOURNAL + ".tmp")
            try:
                write_file(temporary, raw, durable=False)
                os.replace(temporary, self.directory / JOURNAL)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise


def _file_name(shard: str) -> str:
    return f"{shard}.safetensors"
