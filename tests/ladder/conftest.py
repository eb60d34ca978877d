"""Artifacts of a tiny model for the tests here."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from .tiny import write_artifact


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """An artifact that tests may read."""
    return write_artifact(tmp_path_factory.mktemp("artifacts") / "tiny")


@pytest.fixture
def mine(tmp_path, tiny) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(tiny, tmp_path / "mine"))
