"""A running model that goes up and down its ladder without a restart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from pliant.budget import Budget, format_size, parse_size
from pliant.codes import Code, Dense, LowRank
from pliant.errors import BudgetError
from pliant.ladder.artifact import Artifact
from pliant.ladder.rung import Allocation
from pliant.model import code_of, coded_model, find_device, swap
from pliant.model.heap import release
from pliant.plan.memory import Breakdown, activation_bytes, kv_cache_bytes

DEFAULT_CONTEXT = 2048
_OUTER = ("embedding", "head")


@dataclass(frozen=True)
class Plan:
    """What an open model holds.

    allocation: the rung of each target. weight_bytes: of all of them and the fixed tensors.
    memory: the total that was asked for, None when only the weights were bounded.
    breakdown: where all bytes go.
    """

    allocation: Mapping[str, int]
    weight_bytes: int
    context: int
    batch: int
    memory: int | None
    breakdown: Breakdown

    @property
    def planned_bytes(self) -> int:
        """Everything that the running model holds at its peak."""
        return self.breakdown.total


def plan_opening(
    artifact: Artifact,
    memory: int | str | None = None,
    weights: int | str | None = None,
    context: int | None = None,
    batch: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Plan:
    """Which rungs an artifact opens with; nothing is read.

    memory: bytes in total. weights: bytes of weights alone. Without both, the budget that the
    artifact was fitted for. A budget above the largest size takes the largest.
    """
    if memory is not None and weights is not None:
        raise BudgetError("give memory (the total) or weights (their bytes alone), not both")
    config, fitted, ladder = artifact.config(), artifact.budget, artifact.ladder
    if context is None:
        context = fitted.context if fitted else DEFAULT_CONTEXT
    if batch is None:
        batch = fitted.batch if fitted else 1
    check_shape(config, context, batch)
    if memory is None and weights is None and fitted is not None:
        memory = fitted.memory
    kv_cache = kv_cache_bytes(config, context, batch)
    activations = activation_bytes(config, context, batch, dtype_bytes=dtype.itemsize)
    total = None
    if memory is not None:
        total = parse_size(memory)
        bound = total - kv_cache - activations
        if bound < ladder.smallest_bytes:
            least = total - bound + ladder.smallest_bytes
            raise BudgetError(
                f"{format_size(total)} in total leaves {format_size(max(bound, 0))} for weights at "
                f"a context of {context} and a batch of {batch}; the smallest total is "
                f"{format_size(least)} ({least} bytes), or less with a shorter context"
            )
    else:
        bound = parse_size(weights) if weights is not None else ladder.largest_bytes
    allocation = ladder.allocation(bound)
    size = ladder.bytes_of(allocation)
    outer = {t["name"] for t in artifact.targets if t["kind"] in _OUTER}
    embeddings = sum(ladder.rungs[t][i].nbytes for t, i in allocation.items() if t in outer)
    used = size + kv_cache + activations
    free = max(total - used, 0) if total is not None else 0
    breakdown = Breakdown(size - embeddings, embeddings, kv_cache, activations, free)
    return Plan(allocation, size, context, batch, total, breakdown)


def check_shape(config: Any, context: int, batch: int) -> None:
    """Raise BudgetError for a context or batch that the model was not made for."""
    Budget(1, context, batch)
    longest = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if longest is not None and context > longest:
        raise BudgetError(
            f"a context of {context} is more than the {longest} tokens that the model was made for"
        )


class LiveModel:
    """Mixed into the transformers class of an opened model.

    artifact: where its rungs are. plan: what it holds now. compute_dtype: of activations.
    """

    artifact: Artifact
    plan: Plan
    compute_dtype: torch.dtype

    def resize(self, memory: int | str | None = None, weights: int | str | None = None) -> Plan:
        """Go to another size; only targets whose rung changes are read.

        Weights never take more than the larger of the old and the new size on the way. When a
        rung cannot be read, the model stays as it was and the error is raised.
        """
        if memory is None and weights is None:
            raise BudgetError("resize needs memory (the total) or weights (their bytes alone)")
        old = self.plan
        new = plan_opening(
            self.artifact, memory, weights, old.context, old.batch, self.compute_dtype
        )
        changes = {t: i for t, i in new.allocation.items() if old.allocation[t] != i}
        self.artifact.check_rungs(changes)
        self._move(old.allocation, changes, max(old.weight_bytes, new.weight_bytes))
        self.plan = new
        release()
        return new

    def moves(self, weights: int) -> Iterator[Plan]:
        """Go to the size that `weights` bytes hold, one target after the other.

        After each the model is whole and `plan` says what it holds, of which the memory is not
        known any more. What shrinks goes first; weights never take more than the larger of both
        sizes. Stop whenever you like; an error leaves the model between two sizes.
        """
        ladder, old = self.artifact.ladder, self.plan
        goal = ladder.allocation(weights)
        ceiling = max(old.weight_bytes, ladder.bytes_of(goal))
        changes = {t: i for t, i in goal.items() if old.allocation[t] != i}
        for target in sorted(changes, key=lambda t: self._growth(t, changes[t])):
            growth = self._growth(target, changes[target])
            self._replace(target, changes[target], room=ceiling - self.plan.weight_bytes)
            self.plan = self._after(target, changes[target], growth)
            yield self.plan
        release()

    def _growth(self, target: str, index: int) -> int:
        """Bytes that `target` takes more on rung `index` than it does now."""
        rungs = self.artifact.ladder.rungs[target]
        return rungs[index].nbytes - rungs[self.plan.allocation[target]].nbytes

    def _after(self, target: str, index: int, growth: int) -> Plan:
        plan, was = self.plan, self.plan.breakdown
        outer = next(t["kind"] for t in self.artifact.targets if t["name"] == target) in _OUTER
        return replace(
            plan,
            allocation={**plan.allocation, target: index},
            weight_bytes=plan.weight_bytes + growth,
            memory=None,
            breakdown=replace(
                was,
                weights=was.weights + (0 if outer else growth),
                embeddings=was.embeddings + (growth if outer else 0),
                free=0,
            ),
        )

    def _move(self, start: Mapping[str, int], changes: Allocation, ceiling: int) -> None:
        rungs = self.artifact.ladder.rungs
        size = self.artifact.ladder.bytes_of(start)

        def growth(target: str) -> int:
            return rungs[target][changes[target]].nbytes - rungs[target][start[target]].nbytes

        moved: list[str] = []
        try:
            for target in sorted(changes, key=growth):  # what shrinks first
                moved.append(target)
                self._replace(target, changes[target], room=ceiling - size)
                size += growth(target)
        except BaseException:
            for target in reversed(moved):
                self._replace(target, start[target], room=0)
            raise

    def _replace(self, target: str, index: int, room: int) -> None:
        """Swap one target's code; the old one goes before the new is read if `room` is short."""
        if self.artifact.rung(target, index).nbytes > room:
            swap(self, target, _hollow(code_of(self, target)))
        swap(self, target, self.artifact.load_code(target, index))


def _hollow(code: Code) -> Code:
    """A code of the same shape in no bytes: a factorisation of rank 0."""
    out, width = code.shape
    return LowRank(
        Dense(torch.empty(out, 0, dtype=torch.float16, device=code.device)),
        Dense(torch.empty(0, width, dtype=torch.float16, device=code.device)),
    )


def load(
    directory: str | Path,
    memory: int | str | None = None,
    weights: int | str | None = None,
    context: int | None = None,
    batch: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    mixin: type[LiveModel] = LiveModel,
) -> Any:
    """Open an artifact at a size: a transformers model that can also be resized.

    memory: bytes in total, for `context` tokens in each of `batch` sequences; weights: bytes of
    weights alone; sizes as numbers or text ("128MiB"). device: "cpu", "cuda" or "auto", where it
    is read to and runs. dtype: what it computes in; 32 bits on a CPU, bfloat16 on a GPU.
    """
    artifact = Artifact.open(directory)
    place = find_device(str(device))
    dtype = dtype or (torch.float32 if place.type == "cpu" else torch.bfloat16)
    plan = plan_opening(artifact, memory, weights, context, batch, dtype)
    codes = artifact.load_codes(plan.allocation, place)
    model = coded_model(artifact.config(), codes, artifact.load_fixed(), dtype)
    if place.type != "cpu":
        model.to(place)
    if (artifact.directory / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(artifact.directory)
    kind = type(model)
    model.__class__ = type(kind.__name__, (mixin, kind), {"__module__": kind.__module__})
    model.artifact, model.plan, model.compute_dtype = artifact, plan, dtype
    release()
    return model
