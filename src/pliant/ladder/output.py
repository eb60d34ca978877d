"""The output directory: what may be replaced, how it gets its name, what a full disk says."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pliant.budget import format_size
from pliant.errors import PliantError
from pliant.ladder.document import FILE_NAME, SEAL
from pliant.ladder.shard import sync


def check_output(out: str | Path, overwrite: bool = False) -> None:
    """Raise PliantError unless an artifact may be written to `out`; ask before long work."""
    out = Path(out)
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not is_artifact(out):
        raise PliantError(
            f"{out} exists and is not a Pliant artifact, so it will not be replaced; "
            "choose another output directory"
        )
    if not overwrite:
        raise PliantError(
            f"{out} exists; choose another output directory, or allow it to be overwritten"
        )


def is_artifact(path: Path) -> bool:
    """Whether `path` is a directory that a Pliant writer made."""
    try:
        with (path / FILE_NAME).open("rb") as file:
            return file.read(len(SEAL)) == SEAL
    except OSError:
        return False


def put_in_place(stage: Path, out: Path, overwrite: bool) -> None:
    """Rename `stage` to `out`; an artifact that was there is lost only after that succeeded."""
    check_output(out, overwrite)
    aside = _aside(out)
    replaced = out.exists() and any(out.iterdir())
    if replaced:
        if is_artifact(aside):  # left when a replacement was cut short after its last rename
            shutil.rmtree(aside)
        os.rename(out, aside)
    try:
        os.rename(stage, out)
    except BaseException:
        if replaced:
            os.rename(aside, out)
        raise
    sync(out.parent)
    if replaced:
        shutil.rmtree(aside)


def recover(out: str | Path) -> None:
    """Give an artifact its name back when a replacement was cut short between its two renames."""
    out = Path(os.path.abspath(out))
    if not out.exists() and is_artifact(_aside(out)):
        os.rename(_aside(out), out)


def _aside(out: Path) -> Path:
    return out.with_name(f".{out.name}.replaced")


@contextmanager
def told_when_full(directory: Path, needed: int) -> Iterator[None]:
    """Turn a full disk, or one that cannot be written, into an error with figures."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(directory).free
            raise PliantError(
                f"the disk of {directory} is full: {format_size(needed)} were needed, "
                f"{format_size(free)} are free; what was finished is kept, so free some space "
                "and run the same command again"
            ) from error
        raise PliantError(f"cannot write to {directory}: {error}") from error


def empty(directory: Path) -> None:
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def write_file(path: Path, content: Path | bytes | str, *, durable: bool = True) -> None:
    """durable: it survives a power cut."""
    raw = content.read_bytes() if isinstance(content, Path) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(raw.encode() if isinstance(raw, str) else raw)
        if durable:
            file.flush()
            os.fsync(file.fileno())


def length(content: Path | bytes | str) -> int:
    if isinstance(content, Path):
        return content.stat().st_size
    return len(content.encode() if isinstance(content, str) else content)


def link(source: Path, destination: Path) -> None:
    try:
        os.link(source, destination)
    except OSError:
        shutil.copy2(source, destination)
