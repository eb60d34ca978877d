"""Rotary position embedding, on and off: keys can be brought to other positions.

Source: "RoFormer: Enhanced Transformer with Rotary Position Embedding".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """Angles of a position: frequencies [rotated / 2], float32. scale: of what was rotated.

    Halves of the first `rotated` numbers of a head turn against each other, as in transformers.
    """

    frequencies: Tensor
    scale: float = 1.0

    @classmethod
    def of(cls, model: Any) -> Rotary | None:
        """The rotary embedding of a transformers model; None where it has none of one kind."""
        found = [m for m in model.modules() if isinstance(getattr(m, "inv_freq", None), Tensor)]
        if len({id(module) for module in found}) != 1:
            return None
        module = found[0]
        if getattr(module, "rope_type", "default") in ("dynamic", "longrope"):
            return None  # their angles depend on the length
        return cls(module.inv_freq.detach().float(), float(getattr(module, "attention_scaling", 1)))

    def turn(self, states: Tensor, positions: Tensor, back: bool = False) -> Tensor:
        """`states` [..., n, dim] with `positions` [..., n] put on, or taken off; in their dtype.

        Taken off and put on again they are as before, to rounding. Positions can be differences.
        """
        half = len(self.frequencies)
        angles = positions[..., None].float() * self.frequencies.to(states.device)
        cosines, sines = angles.cos(), angles.sin()
        cosines, sines = (cosines, -sines) if back else (cosines, sines)
        scale = 1 / self.scale if back else self.scale
        low, high = states[..., :half].float(), states[..., half : 2 * half].float()
        turned = torch.cat([low * cosines - high * sines, high * cosines + low * sines], -1) * scale
        return torch.cat([turned, states[..., 2 * half :].float()], -1).to(states.dtype)

    def shift(self, states: Tensor, by: Tensor) -> Tensor:
        """`states` that carry positions, moved on `by` [..., n] more."""
        return Rotary(self.frequencies).turn(states, by)
