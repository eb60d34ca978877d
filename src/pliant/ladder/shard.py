"""Shards: safetensors files whose tensors lie in ranges that can be read and checked alone.

A shard holds groups of tensors, one group a rung. Inside a group the tensors follow each other
without gaps, widest dtype first, and a group starts at a multiple of 64 bytes, so that one read
gives memory which every tensor of the rung can view in place. The gaps between groups are uint8
tensors of their own (`pad.N`), because safetensors allows no holes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from threading import Event

import torch
from torch import Tensor

from pliant.errors import CorruptError
from pliant.model.shards import DTYPES

ALIGNMENT = 64
ADVICE = "copy the artifact again, or fit it again"
_CHUNK = 1 << 20

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor inside an extent; offset in bytes from the extent's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class Extent:
    """A checked range of bytes of a shard file, and the tensors in it.

    prefix: what stands before each tensor's name in the safetensors header.
    """

    shard: str
    start: int
    stop: int
    sha256: str
    prefix: str
    tensors: tuple[Entry, ...]

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """What identifies a finished shard file; what it holds is checked extent by extent."""

    nbytes: int
    header_nbytes: int
    header_sha256: str


Group = tuple[str, Mapping[str, Tensor]]  # prefix, tensors
_Form = tuple[str, tuple[int, ...]]  # dtype, shape


class Stopped(Exception):
    """Work in a thread that was told to end before it was done."""


@dataclass(frozen=True)
class _Part:
    """What a shard holds from one extent on.

    padding: bytes before it. pieces: its bytes. source: the directory and the extent that they
    are read from, for bytes that must be those that were written.
    """

    padding: int
    prefix: str
    entries: tuple[Entry, ...]
    pieces: Iterable[memoryview]
    source: tuple[Path, Extent] | None = None


def write_shard(
    path: Path, groups: Iterable[Group], *, durable: bool = True
) -> tuple[ShardInfo, list[Extent]]:
    """Write `groups` to `path` through a temporary file, renamed at the end.

    Nothing is left behind when it fails. durable: it survives a power cut.
    """
    held = [(prefix, dict(tensors)) for prefix, tensors in groups]
    header, places = _lay_out(
        [(prefix, {n: (_NAMES[t.dtype], tuple(t.shape)) for n, t in own.items()})
         for prefix, own in held]
    )  # fmt: skip
    parts = [
        _Part(padding, prefix, entries, _held(own, entries))
        for (padding, entries), (prefix, own) in zip(places, held, strict=True)
    ]
    return _write(path, header, parts, durable)


def copy_extents(
    directory: Path, extents: Sequence[Extent], path: Path, stop: Event | None = None
) -> tuple[ShardInfo, list[Extent]]:
    """Write a shard of some `extents` of a shard in `directory`, as `write_shard` would.

    Takes a piece of memory, not an extent. Raises CorruptError when the bytes are not those that
    were written, and Stopped once `stop` is set; nothing is left behind then.
    """
    header, places = _lay_out(
        [(e.prefix, {t.name: (t.dtype, t.shape) for t in e.tensors}) for e in extents]
    )
    parts = [
        _Part(padding, e.prefix, entries, _pieces(directory, e, stop), (directory, e))
        for (padding, entries), e in zip(places, extents, strict=True)
    ]
    return _write(path, header, parts)


def _write(
    path: Path, header: bytes, parts: Iterable[_Part], durable: bool = True
) -> tuple[ShardInfo, list[Extent]]:
    temporary = path.with_name(path.name + ".tmp")
    size = len(header)
    extents = []
    try:
        with temporary.open("wb") as file:
            file.write(header)
            for part in parts:
                file.write(bytes(part.padding))
                start = size = size + part.padding
                digest = hashlib.sha256()
                for piece in part.pieces:
                    file.write(piece)
                    digest.update(piece)
                    size += piece.nbytes
                found = digest.hexdigest()
                if part.source is not None:
                    _compare(*part.source, found)
                extents.append(Extent(path.name, start, size, found, part.prefix, part.entries))
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)
    return ShardInfo(size, len(header), hashlib.sha256(header).hexdigest()), extents


def read_extent(directory: Path, extent: Extent) -> dict[str, Tensor]:
    """The tensors of `extent`, views into one new piece of memory that only they hold.

    Raises CorruptError when the bytes are not those that were written.
    """
    return views(read_bytes(directory, extent), extent)


def read_bytes(directory: Path, extent: Extent) -> Tensor:
    """The bytes of `extent` [nbytes], checked as `read_extent` checks them."""
    buffer = torch.empty(extent.nbytes, dtype=torch.uint8)
    view: memoryview = buffer.numpy().data
    with _open(directory, extent) as file:
        file.seek(extent.start)
        done = 0
        while done < extent.nbytes:  # one call reads at most 2 GiB
            read = file.readinto(view[done:])
            if not read:
                raise _truncated(directory, extent.shard, extent.stop)
            done += read
    _compare(directory, extent, hashlib.sha256(view).hexdigest())
    return buffer


def views(buffer: Tensor, extent: Extent) -> dict[str, Tensor]:
    """The tensors of `extent` as views into its bytes [nbytes]."""
    return {
        entry.name: buffer[entry.offset : entry.offset + _size(entry)]
        .view(DTYPES[entry.dtype])
        .view(entry.shape)
        for entry in extent.tensors
    }


def check_extent(directory: Path, extent: Extent) -> None:
    """Read `extent` piece by piece and raise CorruptError unless its checksum holds."""
    digest = hashlib.sha256()
    for piece in _pieces(directory, extent):
        digest.update(piece)
    _compare(directory, extent, digest.hexdigest())


def _pieces(directory: Path, extent: Extent, stop: Event | None = None) -> Iterator[memoryview]:
    """The bytes of `extent`, a piece at a time in memory that the next piece takes."""
    room = memoryview(bytearray(min(extent.nbytes, _CHUNK)))
    left = extent.nbytes
    with _open(directory, extent) as file:
        file.seek(extent.start)
        while left:
            if stop is not None and stop.is_set():
                raise Stopped
            read = file.readinto(room[:left])
            if not read:
                raise _truncated(directory, extent.shard, extent.stop)
            yield room[:read]
            left -= read


def check_size(directory: Path, name: str, info: ShardInfo) -> None:
    """Raise CorruptError unless the shard is there with all its bytes."""
    try:
        found = (directory / name).stat().st_size
    except OSError as error:
        raise CorruptError(f"{directory / name} is missing ({error.strerror}); {ADVICE}") from None
    if found < info.nbytes:
        raise _truncated(directory, name, info.nbytes, found)
    if found > info.nbytes:
        raise CorruptError(
            f"{directory / name} has {found} bytes, {info.nbytes} were expected; {ADVICE}"
        )


def check_header(directory: Path, name: str, info: ShardInfo) -> None:
    """Raise CorruptError unless the shard's header is the one that was written."""
    with (directory / name).open("rb") as file:
        found = hashlib.sha256(file.read(info.header_nbytes)).hexdigest()
    if found != info.header_sha256:
        raise CorruptError(f"the header of {directory / name} fails its checksum; {ADVICE}")


def check_whole(directory: Path, name: str, info: ShardInfo, extents: Iterable[Extent]) -> None:
    """Raise CorruptError unless the shard's header and its `extents` are as they were written."""
    check_size(directory, name, info)
    check_header(directory, name, info)
    for extent in extents:
        check_extent(directory, extent)


def sync(path: Path) -> None:
    """Make a file's bytes, or a directory's renames, survive a power cut, where the system can."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def _lay_out(
    groups: Sequence[tuple[str, Mapping[str, _Form]]],
) -> tuple[bytes, list[tuple[int, tuple[Entry, ...]]]]:
    """The header of a shard of `groups`, and of each its padding and the places in it."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    parts = []
    position = 0  # in the data section, which starts at a multiple of ALIGNMENT
    for number, (prefix, forms) in enumerate(groups):
        padding = -position % ALIGNMENT
        if padding:
            header[f"pad.{number}"] = _describe("U8", (padding,), position, position + padding)
        start = position = position + padding
        entries = []
        for name in sorted(forms, key=lambda name: (-DTYPES[forms[name][0]].itemsize, name)):
            dtype, shape = forms[name]
            entry = Entry(name, dtype, shape, position - start)
            entries.append(entry)
            stop = position + _size(entry)
            header[prefix + name] = _describe(dtype, shape, position, stop)
            position = stop
        parts.append((padding, tuple(entries)))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, parts


def _describe(dtype: str, shape: Iterable[int], start: int, stop: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


def _held(tensors: Mapping[str, Tensor], entries: Iterable[Entry]) -> Iterator[memoryview]:
    for entry in entries:
        yield _raw(tensors[entry.name])


def _raw(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    raw: memoryview = flat.view(torch.uint8).numpy().data
    return raw


def _size(entry: Entry) -> int:
    count = 1
    for extent in entry.shape:
        count *= extent
    return count * DTYPES[entry.dtype].itemsize


def _open(directory: Path, extent: Extent) -> FileIO:
    try:
        return (directory / extent.shard).open("rb", buffering=0)
    except OSError as error:
        raise CorruptError(
            f"{directory / extent.shard} cannot be read ({error.strerror}); {ADVICE}"
        ) from None


def _compare(directory: Path, extent: Extent, found: str) -> None:
    if found != extent.sha256:
        raise CorruptError(
            f"{directory / extent.shard} is damaged: the bytes of {extent.prefix.rstrip('.')} "
            f"({extent.start} to {extent.stop}) fail their checksum; {ADVICE}"
        )


def _truncated(directory: Path, name: str, expected: int, found: int | None = None) -> CorruptError:
    have = "" if found is None else f"it has {found} bytes, "
    return CorruptError(
        f"{directory / name} is truncated: {have}{expected} were expected; {ADVICE}"
    )
