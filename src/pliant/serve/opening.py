"""Which engine serves an artifact, and the size that its weights start with."""

from __future__ import annotations

from pathlib import Path

from pliant.budget import format_size, parse_size
from pliant.cache import PageShape
from pliant.errors import BudgetError, PliantError, UnsupportedModelError
from pliant.ladder import Artifact
from pliant.ladder.live import DEFAULT_CONTEXT, check_shape
from pliant.plan.joint import JointPlan
from pliant.plan.memory import kv_cache_bytes, serving_bytes
from pliant.run import load
from pliant.serve.batching import MOST_RUNNING, BatchingEngine
from pliant.serve.room import IDLE_TOKENS, SHARE_DAMAGE, cache_cost, demand_of
from pliant.serve.sequential import SequentialEngine
from pliant.serve.threaded import ThreadedEngine


def open_engine(
    directory: str | Path,
    memory: int | str | None = None,
    weights: int | str | None = None,
    context: int | None = None,
    *,
    most: int = MOST_RUNNING,
    device: str = "cpu",
    share_damage: float = SHARE_DAMAGE,
    swap: Path | None = None,
) -> ThreadedEngine:
    """An engine that serves the artifact inside `memory` bytes, weights and KV pages together.

    memory: without it, what the artifact was fitted for. weights: they keep this size, and pages
    have what is left (without `memory`: what one sequence of `context` tokens takes in 16 bits).
    most: requests that run at once. One at a time where the model's cache cannot be paged, or most
    is 1. BudgetError for a budget that holds no request.
    """
    artifact = Artifact.open(directory)
    config, fitted = artifact.config(), artifact.budget
    if context is None:
        context = fitted.context if fitted else DEFAULT_CONTEXT
    if swap is not None and not swap.is_dir():
        raise PliantError(f"there is no directory {swap} to swap to")
    check_shape(config, context, most)
    try:
        shape = PageShape.of(config)
    except UnsupportedModelError:
        most = 1
    if most == 1:
        model = load(artifact.directory, memory, weights, context, batch=1, device=device)
        return SequentialEngine(model, artifact.tokenizer())
    if memory is None and weights is None and fitted is not None:
        memory = fitted.memory
    reserved = serving_bytes(config, context, most)
    total = None if memory is None else parse_size(memory)
    if weights is None:
        total = total or reserved + artifact.ladder.largest_bytes + kv_cache_bytes(
            config, context, most
        )  # fmt: skip
        start = starting_weights(artifact, shape, total - reserved, reserved, context)
    else:
        start = parse_size(weights)
    model = load(artifact.directory, None, start, context, batch=1, device=device)
    return BatchingEngine(
        model, artifact.tokenizer(), total, most=most, share_damage=share_damage,
        fixed=weights is not None, swap=swap,
    )  # fmt: skip


def starting_weights(
    artifact: Artifact, shape: PageShape, memory: int, reserved: int, context: int
) -> int:
    """Bytes of the weights before anybody asks for anything; the pages have the rest of `memory`.

    reserved: what activations have already. BudgetError where not even the smallest size and a
    request of `context` tokens fit.
    """
    plan = JointPlan(artifact.ladder.frontier(), cache_cost(artifact, shape))
    split = plan.split(memory, demand_of(shape, [min(context, IDLE_TOKENS)]))
    least = plan.smallest + plan.cost.nbytes(demand_of(shape, [context]))
    if split is None or memory < least:
        raise BudgetError(
            f"{format_size(memory + reserved)} in total leaves {format_size(max(memory, 0))} "
            f"beside activations; the smallest total for requests of {context:,} tokens is "
            f"{format_size(least + reserved)} ({least + reserved} bytes), or less with a "
            "shorter --context or a smaller --batch"
        )
    return split.weights
