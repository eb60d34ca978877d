"""Ours in the quality bench: one artifact, at one size after another."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from absolute import linear_ladder
from pliant.codes import Dense
from pliant.ladder import Artifact
from pliant.model import Checkpoint, StreamedModel, coded_model, swap


class Ours:
    """An artifact's model on `device`, its codes decoded once for a size, not in every forward.

    comparison "total": everything. "linear": the ladder of the linear layers alone, embedding and
    head as the original has them.
    """

    def __init__(self, directory: Path, comparison: str, original: Checkpoint, device: str) -> None:
        self._artifact = Artifact.open(directory)
        whole = comparison == "total"
        self.ladder = self._artifact.ladder if whole else linear_ladder(self._artifact)
        self._device = device
        self._held: dict[str, int] = {}
        source = StreamedModel(original)
        empty = torch.zeros(1)
        codes = {
            t.name: Dense(
                empty.expand(t.shape) if t.name in self.ladder.rungs else source.weight(t)
            )
            for t in source.targets
        }
        self.model: Any = coded_model(
            self._artifact.config(), codes, self._artifact.load_fixed()
        ).to(device)

    def go_to(self, size: int) -> int:
        """Hold the ladder's rungs for at most `size` bytes; the bytes that they take."""
        allocation = self.ladder.allocation(size)
        for name, index in allocation.items():
            if self._held.get(name) != index:
                code = self._artifact.load_code(name, index).to(self._device)
                swap(self.model, name, Dense(code.decode()))
                self._held[name] = index
        return self.ladder.bytes_of(allocation)
