"""Text to measure on: read from a file or a dataset, split, cut into windows of tokens."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pliant.errors import PliantError

WINDOW = 512
_EVALUATION_END, _CALIBRATION_START = 0.6, 0.7


def load_text(source: str | Path) -> str:
    """The text of a file, or of a Hugging Face dataset named as NAME[:CONFIG[:SPLIT]].

    The split is "test" unless given. Raises PliantError when there is neither, or no text in it.
    """
    path = Path(source)
    if path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PliantError(f"{path} cannot be read as UTF-8 text: {error}") from error
    elif path.is_dir():
        raise PliantError(f"{path} is a directory; name a text file in it")
    else:
        text = _dataset_text(str(source))
    if not text.strip():
        raise PliantError(f"{source} holds no text; pass a file with at least a window of it")
    return text


def split(text: str, part: Literal["evaluation", "calibration"]) -> str:
    """The first 60% of the characters for evaluation, or the last 30% for calibration.

    The tenth between belongs to neither, so that no passage is in both.
    """
    if part == "evaluation":
        return text[: int(len(text) * _EVALUATION_END)]
    if part == "calibration":
        return text[int(len(text) * _CALIBRATION_START) :]
    raise PliantError(f"a text has the parts evaluation and calibration, not {part!r}")


def windows(text: str, tokenizer: Any, window: int = WINDOW, limit: int | None = None) -> Tensor:
    """Non-overlapping windows [n, window] of token ids, without special tokens.

    What is left after the last whole window is dropped. limit: at most so many, from the start.
    """
    if window < 2:
        raise PliantError(f"a window needs at least 2 tokens, not {window}")
    if limit is not None and limit < 1:
        raise PliantError(f"at least one window must be measured, not {limit}")
    if not text.strip():
        raise PliantError("the text is empty; pass at least a window of it")
    if limit is not None:  # tokens are rarely longer than 16 characters: tokenise no more
        text = text[: 16 * window * limit]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    count = len(ids) // window
    if not count:
        raise PliantError(
            f"the text has {len(ids)} tokens, fewer than a window of {window}; pass a longer text "
            "or a smaller --window"
        )
    count = count if limit is None else min(count, limit)
    return torch.tensor(ids[: count * window], dtype=torch.long).view(count, window)


def _dataset_text(name: str) -> str:
    """Every text of a dataset's split, one after the other."""
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise PliantError(
            f"there is no file {name!r}; if it is the name of a dataset, `pip install datasets` "
            "and try again"
        ) from error
    path, config, part = [*name.split(":"), None, None][:3]
    try:
        rows = datasets.load_dataset(path, config or None, split=part or "test")
    except Exception as error:  # the library raises a wide range of errors of its own
        raise PliantError(
            f"{name!r} is neither a file nor a dataset that can be loaded here ({error}); "
            "pass a text file"
        ) from error
    columns = [c for c in rows.column_names if isinstance(rows[0][c], str)] if len(rows) else []
    if not columns:
        raise PliantError(f"the dataset {name!r} has no column of text")
    column = "text" if "text" in columns else columns[0]
    return "\n".join(rows[column])
