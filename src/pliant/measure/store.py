"""The original's hidden states on disk, so that a second measurement need not run it again."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pliant.model import cache_directory

_FORMAT = "1"


def reference_path(key: str, windows: Tensor, score: str) -> Path:
    """The file of one model (`key`), one text and one way to score it."""
    digest = hashlib.sha256(f"{_FORMAT}|{key}|{tuple(windows.shape)}|{score}|".encode())
    digest.update(windows.cpu().contiguous().numpy().tobytes())
    return cache_directory() / "references" / f"{digest.hexdigest()[:32]}.safetensors"


def load_reference(key: str, windows: Tensor, score: str) -> Tensor | None:
    """Hidden states [windows, positions, hidden] as they were stored, None when they are not."""
    path = reference_path(key, windows, score)
    try:
        hidden: Tensor = load_file(path)["hidden"]
    except (OSError, SafetensorError, KeyError):
        return None
    return hidden


def save_reference(key: str, windows: Tensor, score: str, hidden: Tensor) -> None:
    """Best effort: without room or permission the next measurement runs the model again."""
    path = reference_path(key, windows, score)
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"hidden": hidden.contiguous().cpu()}, beside)
        beside.replace(path)
    except (OSError, SafetensorError):
        beside.unlink(missing_ok=True)
