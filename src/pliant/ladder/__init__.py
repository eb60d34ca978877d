"""Ladders: every size of a model in one artifact, opened and resized at any of them."""

from pliant.ladder.artifact import Artifact
from pliant.ladder.live import LiveModel, Plan, load
from pliant.ladder.output import check_output, is_artifact
from pliant.ladder.rung import Allocation, Ladder, Rung, Step
from pliant.ladder.writer import Proposal, Writer

__all__ = [
    "Allocation",
    "Artifact",
    "Ladder",
    "LiveModel",
    "Plan",
    "Proposal",
    "Rung",
    "Step",
    "Writer",
    "check_output",
    "is_artifact",
    "load",
]
