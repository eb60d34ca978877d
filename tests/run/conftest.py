"""One open model for the tests here."""

from __future__ import annotations

import pytest

from pliant.run import load

from ..ladder.tiny import write_artifact


@pytest.fixture(scope="session")
def artifact(tmp_path_factory):
    return write_artifact(tmp_path_factory.mktemp("artifacts") / "tiny")


@pytest.fixture(scope="session")
def model(artifact):
    return load(artifact, weights=120_000, context=200)
