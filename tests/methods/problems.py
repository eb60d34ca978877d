"""A weight and correlated inputs, for the tests of methods that round with feedback."""

from __future__ import annotations

import torch
from torch import Tensor

from pliant.observe.statistics import Statistics


def correlated(width: int, tokens: int = 2048, seed: int = 0) -> Tensor:
    """Second moment of inputs whose energy falls over rotated directions and uneven channels."""
    generator = torch.Generator().manual_seed(seed)
    energy = torch.arange(1, width + 1).float() ** -0.7
    mix = torch.randn(width, width, generator=generator) / width**0.5
    channels = torch.rand(width, generator=generator) * 2 + 0.1
    x = (torch.randn(tokens, width, generator=generator) * energy) @ mix * channels
    return x.t() @ x / tokens


def problem(out: int = 48, width: int = 128) -> tuple[Tensor, Statistics]:
    weight = torch.randn(out, width, generator=torch.Generator().manual_seed(1)) * 0.05
    return weight, Statistics(tokens=2048, second_moment=correlated(width))
