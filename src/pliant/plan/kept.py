"""Measurements of this machine that are made once and kept in the cache directory, as JSON."""

from __future__ import annotations

import json
import os
from typing import Any

from pliant.model import cache_directory


def read(file: str) -> dict[str, Any]:
    """What was kept in `file`; nothing where it cannot be read."""
    try:
        known = json.loads((cache_directory() / file).read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def write(file: str, known: dict[str, Any]) -> None:
    """Best effort: a read-only home directory only costs the measurement again."""
    path = cache_directory() / file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{os.getpid()}.tmp")
        beside.write_text(json.dumps(known, indent=1, sort_keys=True))
        beside.replace(path)
    except OSError:
        return
