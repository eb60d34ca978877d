"""Where a model is put and run."""

from __future__ import annotations

import torch

from pliant.errors import PliantError


def find_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the first GPU, or the CPU where there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise PliantError(
            f"the device {name!r} cannot be used: {reason}; try --device cpu"
        ) from error
    return device
