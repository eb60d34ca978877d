"""Where a fit computes, and how much of a model stays there."""

from __future__ import annotations

import psutil
import torch

from pliant.errors import PliantError

_RESIDENT_BYTES = 1 << 30  # of weights in float32: so much is kept in memory between passes


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


def resident_bytes(device: torch.device) -> int:
    """Bytes of weights in float32 that may stay on `device` between passes over a model."""
    if device.type != "cuda":
        return _RESIDENT_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    return free // 3


def held_bytes(device: torch.device) -> dict[str, int]:
    """Bytes of codes that may stay in memory: a quarter of what is free, beside a GPU.

    None where the work itself is done in main memory.
    """
    if device.type != "cuda":
        return {}
    free, _ = torch.cuda.mem_get_info(device)
    return {"cuda": free // 4, "cpu": int(psutil.virtual_memory().available) // 4}
