"""Work in progress on disk: what a fit needs later, or again after an interruption."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from pliant.ladder.output import told_when_full
from pliant.ladder.shard import write_shard
from pliant.observe import Observation, Statistics
from pliant.observe.statistics import FIELDS

_SAMPLE = "sample-"


def store(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file of work in progress, whole or not at all."""
    with told_when_full(path.parent, sum(tensor.nbytes for tensor in tensors.values())):
        write_shard(path, [("", tensors)], durable=False)


def _aside(work: Path, observation: Observation) -> Path:
    rows = observation.target.rows or (0, 0)
    return work / f"outer-{observation.target.role}-{rows[0]}.safetensors"


def put_aside(work: Path, observation: Observation) -> Observation:
    """The observation without its tensors, which go to disk."""
    statistics = {n: getattr(observation.statistics, n) for n in sorted(FIELDS)}
    pairs = {"inputs": observation.inputs, "gradients": observation.gradients}
    sample = {_SAMPLE + n: getattr(observation.statistics, n) for n in pairs}
    every = (statistics | pairs | sample).items()
    held = {n: t.contiguous() for n, t in every if t is not None}
    store(_aside(work, observation), held)
    light = Statistics(tokens=observation.statistics.tokens)
    return dataclasses.replace(observation, statistics=light, inputs=None, gradients=None)


def take_back(work: Path, observation: Observation, device: torch.device) -> Observation:
    """What `put_aside` put aside, on `device`."""
    held = load_file(_aside(work, observation), device=str(device))
    pairs = {n: held.pop(n, None) for n in ("inputs", "gradients")}
    sample = {n: held.pop(_SAMPLE + n, None) for n in pairs}
    statistics = Statistics(tokens=observation.statistics.tokens, **held, **sample)
    return dataclasses.replace(observation, statistics=statistics, **pairs)
