"""How much of a model, and of its codes, stays in memory during a fit."""

from __future__ import annotations

import psutil
import torch

_RESIDENT_BYTES = 1 << 30  # of weights in float32: so much is kept in memory between passes


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
