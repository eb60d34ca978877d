"""Text of kinds that calibration never saw: code, dialogue, another language, mathematics.

Each kind is read out of a small package of the Python index, pinned to a version so that every
machine measures on the same tokens, fetched once into the cache and never installed or copied:

    code         Django's Python source (BSD-3-Clause)
    dialogue     the English conversations of chatterbot-corpus (BSD-3-Clause)
    french       Django's French translations (BSD-3-Clause)
    mathematics  mpmath's documentation strings: prose, formulas and worked values (BSD-3-Clause)
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from pliant.model import cache_directory
from pliant.observe import windows

WINDOWS = 16


def kind_windows(kind: str, tokenizer: Any, count: int = WINDOWS) -> Tensor:
    """Windows [at most count, 512] of token ids, evenly spaced over the text of one kind."""
    package, read = KINDS[kind]
    with zipfile.ZipFile(fetched(package)) as wheel:
        text = "\n".join(read(wheel))
    found = windows(text, tokenizer)
    return spread(found, count)


def spread(found: Tensor, count: int) -> Tensor:
    """At most `count` windows of `found` [n, T], evenly spaced: what all benches measure on."""
    return found[torch.linspace(0, len(found) - 1, min(count, len(found))).long()]


def fetched(package: str) -> Path:
    """The wheel of `name==version`, downloaded once."""
    directory = cache_directory() / "texts"
    directory.mkdir(parents=True, exist_ok=True)
    name, version = package.split("==")
    stem = f"{name.replace('-', '_')}-{version}-".lower()
    for known in directory.glob("*.whl"):
        if known.name.lower().startswith(stem):
            return known
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary", ":all:", "--dest", scratch, package]
        subprocess.run(command, check=True)
        wheel = next(Path(scratch).glob("*.whl"))
        return wheel.replace(directory / wheel.name)


def _code(wheel: zipfile.ZipFile) -> Iterator[str]:
    for name in sorted(wheel.namelist()):
        if name.startswith("django/db/") and name.endswith(".py"):
            yield wheel.read(name).decode()


def _dialogue(wheel: zipfile.ZipFile) -> Iterator[str]:
    for name in sorted(wheel.namelist()):
        if "/data/english/" in name and name.endswith(".yml"):
            for turns in yaml.safe_load(wheel.read(name)).get("conversations", []):
                speakers = ("A", "B")
                yield "\n".join(f"{speakers[i % 2]}: {t}" for i, t in enumerate(turns)) + "\n"


def _french(wheel: zipfile.ZipFile) -> Iterator[str]:
    for name in sorted(wheel.namelist()):
        if name.endswith("/locale/fr/LC_MESSAGES/django.po"):
            yield from _translations(wheel.read(name).decode())


def _translations(catalogue: str) -> Iterator[str]:
    """The msgstr entries of a .po file, without its header."""
    parts: list[str] | None = None
    entries: list[str] = []
    for line in [*catalogue.splitlines(), ""]:
        if line.startswith("msgstr"):
            parts = [ast.literal_eval(line.split(" ", 1)[1])]
        elif parts is not None and line.startswith('"'):
            parts.append(ast.literal_eval(line))
        elif parts is not None:
            entries.append("".join(parts).strip())
            parts = None
    yield from (entry for entry in entries[1:] if entry)


def _mathematics(wheel: zipfile.ZipFile) -> Iterator[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for name in sorted(wheel.namelist()):
        if name.endswith(".py") and "/tests/" not in name:
            for node in ast.walk(ast.parse(wheel.read(name).decode())):
                found = ast.get_docstring(node) if isinstance(node, documented) else None
                if found and len(found) > 200:
                    yield found + "\n"
            if name.endswith("function_docs.py"):  # documentation kept in plain assignments
                for node in ast.parse(wheel.read(name).decode()).body:
                    value = getattr(node, "value", None)
                    if isinstance(value, ast.Constant) and isinstance(value.value, str):
                        yield value.value + "\n"


KINDS: dict[str, tuple[str, Callable[[zipfile.ZipFile], Iterator[str]]]] = {
    "code": ("Django==5.1.4", _code),
    "dialogue": ("chatterbot-corpus==1.2.2", _dialogue),
    "french": ("Django==5.1.4", _french),
    "mathematics": ("mpmath==1.3.0", _mathematics),
}
