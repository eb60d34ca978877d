"""What a fit made, and the same read back from an artifact."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pliant.ladder import Artifact
from pliant.ladder.live import Plan, plan_opening
from pliant.plan.memory import Breakdown


@dataclass(frozen=True)
class FitResult:
    """What `fit` made, or with `dry_run` would make.

    planned_bytes: everything that the model holds when it runs in the budget. damage: predicted,
    nats a token. smallest_bytes and largest_bytes: weights at the ladder's ends.
    """

    path: Path | None
    budget_bytes: int
    planned_bytes: int
    breakdown: Breakdown
    damage: float | None
    bits: float
    targets: int
    rungs: int
    smallest_bytes: int
    largest_bytes: int
    original_bytes: int
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        found = dataclasses.asdict(self)
        found["path"] = None if self.path is None else str(self.path)
        return found


def summary(path: str | Path, note: str = "") -> FitResult:
    """The FitResult of an artifact on disk, at the budget that it was fitted for."""
    artifact = Artifact.open(path)
    plan: Plan = plan_opening(artifact)
    ladder = artifact.ladder
    damage = ladder.damage_at(plan.weight_bytes)
    numbers = sum(t["shape"][0] * t["shape"][1] for t in artifact.targets)
    return FitResult(
        Path(path), plan.memory or plan.planned_bytes, plan.planned_bytes, plan.breakdown, damage,
        8 * plan.weight_bytes / numbers, len(ladder.rungs),
        sum(len(rungs) for rungs in ladder.rungs.values()), ladder.smallest_bytes,
        ladder.largest_bytes, int(artifact.provenance.get("original_bytes", 0)), note,
    )  # fmt: skip
