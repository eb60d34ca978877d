"""Reading safetensors files one tensor at a time, into fresh memory.

A memory map would leave every page that was read in the resident memory of the process; `pread`
does not.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pliant.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_HEADER_LIMIT = 1 << 28
_SAMPLES = 64
_SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: `nbytes` bytes at `offset` of `file`."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors that a safetensors file holds; CheckpointError if they cannot all be there."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(_HEADER_LIMIT, size - 8):
                raise CheckpointError(
                    f"{file} is not a complete safetensors file: its header should take {length} "
                    f"bytes but the file has {size}; download or copy it again"
                )
            header = json.loads(stream.read(length))
        entries = {
            name: _entry(file, name, fields, 8 + length)
            for name, fields in header.items()
            if name != "__metadata__"
        }
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file} has a damaged safetensors header ({error}); download or copy it again"
        ) from error
    end = max((entry.offset + entry.nbytes for entry in entries.values()), default=0)
    if end > size:
        last = max(entries, key=lambda name: entries[name].offset)
        raise CheckpointError(
            f"{file} is truncated: its header describes {end} bytes (up to tensor {last!r}) but "
            f"the file has {size}; download or copy it again"
        )
    return entries


def _entry(file: Path, name: str, fields: dict, start: int) -> Entry:
    if fields["dtype"] not in DTYPES:
        raise CheckpointError(f"{file}: tensor {name!r} has unknown dtype {fields['dtype']!r}")
    dtype = DTYPES[fields["dtype"]]
    shape = tuple(int(size) for size in fields["shape"])
    begin, end = fields["data_offsets"]
    if begin < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(
            f"{file}: tensor {name!r} of shape {list(shape)} and dtype {fields['dtype']} cannot "
            f"take the {end - begin} bytes that the header gives it"
        )
    return Entry(file, dtype, shape, start + begin, end - begin)


def read_entry(entry: Entry, rows: tuple[int, int] | None = None) -> Tensor:
    """The tensor at `entry`, or only its rows [rows[0], rows[1]), in its stored dtype."""
    shape, offset, nbytes = entry.shape, entry.offset, entry.nbytes
    if rows is not None:
        row_bytes = nbytes // shape[0]
        shape = (rows[1] - rows[0], *shape[1:])
        offset, nbytes = offset + rows[0] * row_bytes, shape[0] * row_bytes
    return read_bytes(entry.file, offset, nbytes).view(entry.dtype).reshape(shape)


def read_bytes(file: Path, offset: int, nbytes: int) -> Tensor:
    """uint8 [nbytes], read from `file` into fresh memory."""
    buffer = torch.empty(nbytes, dtype=torch.uint8)
    view = buffer.numpy().data
    done = 0
    try:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            while done < nbytes:
                count = os.preadv(descriptor, [view[done:]], offset + done)
                if count == 0:
                    raise CheckpointError(
                        f"{file} ended at byte {offset + done}, {nbytes - done} bytes early; "
                        "was it changed while it was being read?"
                    )
                done += count
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from error
    return buffer


def sample_digest(file: Path) -> str:
    """sha256 over a file's size and evenly spaced samples of it: cheap, and stable over copies."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        for sample in range(_SAMPLES):
            stream.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
            digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()
