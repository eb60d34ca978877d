"""What is put aside comes back, the statistics' own sample apart from the observation's."""

from __future__ import annotations

from pathlib import Path

import torch

from pliant.fit.scratch import put_aside, take_back
from pliant.model import Target
from pliant.observe import Observation, Statistics


def test_both_samples_come_back(tmp_path: Path) -> None:
    target = Target("head", "head", "head", None, "head", (4, 3))
    statistics = Statistics(9, torch.eye(3), inputs=torch.ones(5, 3), gradients=torch.ones(5, 4))
    seen = Observation(target, statistics, torch.zeros(6, 3), torch.zeros(6, 4), share=0.5)
    light = put_aside(tmp_path, seen)
    assert light.inputs is None
    assert light.statistics.pairs is None
    again = take_back(tmp_path, light, torch.device("cpu"))
    assert again.inputs is not None
    assert again.statistics.pairs is not None
    assert again.statistics.second_moment is not None
    assert torch.equal(again.inputs, torch.zeros(6, 3))
    assert torch.equal(again.statistics.pairs[0], torch.ones(5, 3))
    assert (again.share, again.statistics.tokens) == (0.5, 9)


def test_what_was_never_sampled_stays_so(tmp_path: Path) -> None:
    target = Target("head", "head", "head", None, "head", (4, 3))
    seen = Observation(target, Statistics(9, torch.eye(3)), torch.zeros(6, 3), torch.zeros(6, 4))
    again = take_back(tmp_path, put_aside(tmp_path, seen), torch.device("cpu"))
    assert again.statistics.pairs is None
