"""ladder.json: what an artifact says of itself, checked on the way in."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pliant.errors import CorruptError
from pliant.ladder.rung import Ladder, Rung, Step
from pliant.ladder.shard import ADVICE, Extent, ShardInfo

FILE_NAME = "ladder.json"
FORMAT = "pliant-ladder"
VERSION = 1


@dataclass(frozen=True)
class Document:
    """Everything in ladder.json.

    rungs: by target, rising. targets: the fields of each `model.Target`.
    budget: memory, context, batch that the artifact was fitted for.
    """

    rungs: dict[str, tuple[Rung, ...]]
    climb: tuple[Step, ...]
    fixed: Extent
    shards: dict[str, ShardInfo]
    start_damage: float = 0.0
    targets: list[dict[str, Any]] = field(default_factory=list)
    budget: dict[str, int] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    format: str = FORMAT
    version: int = VERSION

    def ladder(self) -> Ladder:
        return Ladder(self.rungs, self.climb, self.fixed.nbytes, self.start_damage)


_ADAPTER: TypeAdapter[Document] = TypeAdapter(Document)
SEAL = b'{"sha256":"'
_SEAL_BYTES = len(SEAL) + 64 + 2


def to_bytes(document: Document) -> bytes:
    """The file's bytes: sorted keys, no times, and first a checksum of all that follows it."""
    fields = _ADAPTER.dump_python(document, mode="json")
    body = json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)[1:].encode()
    return SEAL + hashlib.sha256(body).hexdigest().encode() + b'",' + body


def from_bytes(raw: bytes, path: Path) -> Document:
    """The document in `raw`; CorruptError says what is wrong with `path`."""
    try:
        document = _ADAPTER.validate_json(raw)
    except ValidationError as error:
        _check_version(raw, path)
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise CorruptError(f"{path} is damaged: {place}: {first['msg']}; {ADVICE}") from None
    if (document.format, document.version) != (FORMAT, VERSION):
        _check_version(raw, path)
    if not raw.startswith(SEAL + hashlib.sha256(raw[_SEAL_BYTES:]).hexdigest().encode()):
        raise CorruptError(f"{path} fails its own checksum; {ADVICE}")
    for rungs in document.rungs.values():
        for rung in rungs:
            if rung.where.shard not in document.shards or rung.where.nbytes != rung.nbytes:
                raise CorruptError(
                    f"{path} is damaged: rung {rung.index} of {rung.target} has no place on disk"
                )
    return document


def _check_version(raw: bytes, path: Path) -> None:
    try:
        fields = json.loads(raw)
        form, version = fields["format"], fields["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptError(f"{path} is damaged: {error}; {ADVICE}") from None
    if (form, version) != (FORMAT, VERSION):
        raise CorruptError(
            f"{path} has format {form!r} version {version!r}, this Pliant reads {FORMAT!r} "
            f"version {VERSION}; fit the model again or use the Pliant that wrote it"
        )
