"""One thread, and one checkpoint for all tests that do not change it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.fit.tiny import checkpoint


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 23 targets; tests may read it."""
    directory = tmp_path_factory.mktemp("llama") / "model"
    checkpoint(directory)
    return directory
