"""What a KV cache of fewer bits costs an artifact's model: measured once and kept beside it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field, ValidationError

from pliant.errors import CorruptError, PliantError

FILE_NAME = "kv_cache.json"


class CacheRecord(BaseModel):
    """damage: nats a token of a cache in so many bits, from the same model's in 16.

    text: what it was measured on. tokens: scored. window: tokens of context.
    """

    format: Literal[1] = 1
    damage: dict[int, Annotated[float, Field(ge=0, allow_inf_nan=False)]]
    text: str
    tokens: int
    window: int


def read_record(directory: Path) -> CacheRecord | None:
    """The record of an artifact; None where none was made, CorruptError where it is broken."""
    path = directory / FILE_NAME
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise PliantError(f"{path} cannot be read: {error.strerror}") from None
    try:
        return CacheRecord.model_validate_json(raw)
    except ValidationError as error:
        what = error.errors()[0]["msg"]
        raise CorruptError(
            f"{path} is damaged ({what}); delete it, and `pliant cache` makes it anew"
        ) from None


def write_record(directory: Path, record: CacheRecord) -> None:
    """Write it, whole or not at all; PliantError where the directory takes no file."""
    path = directory / FILE_NAME
    beside = path.with_suffix(".tmp")
    try:
        with beside.open("w") as file:
            file.write(json.dumps(record.model_dump(), indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise PliantError(f"{path} cannot be written: {error.strerror}") from None
