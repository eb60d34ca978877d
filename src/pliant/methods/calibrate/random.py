"""Calibration text at random: what every other choice is compared with."""

from __future__ import annotations

import torch

from pliant.methods.catalog import method
from pliant.observe.candidates import Candidates, Selection, check_count


@method(
    "random",
    kind="calibrate",
    paper="GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers "
    "(random windows)",
)
def random(candidates: Candidates, count: int, *, seed: int = 0) -> Selection:
    """`count` of the candidates, drawn without replacement, all of the same weight."""
    check_count(candidates, count)
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))
    return Selection.of(order[:count])
