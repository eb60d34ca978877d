"""What tests of kernels share."""

from __future__ import annotations

import pytest


@pytest.fixture(params=["off", "gradients"])
def why(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Why a GPU's products are the reference's: its kernels are off, or gradients are asked for."""
    if request.param == "off":
        monkeypatch.delenv("PLIANT_GPU_KERNELS", raising=False)
    else:
        monkeypatch.setenv("PLIANT_GPU_KERNELS", "1")
    return str(request.param)
