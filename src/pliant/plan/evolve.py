"""Evolving the choice of rungs at one size, by the damage of whole models.

Source: EvoPress: Towards Optimal Dynamic Model Compression via Evolutionary Search. The sum of
layer errors can rank two models wrongly, so models themselves are compared. The start is the
climb's allocation: its damages come from one backward pass that weighs all layers at once
(second-order prediction), so the search only has to find where that sum misleads.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pliant.errors import PliantError
from pliant.plan.climb import Option
from pliant.plan.scored import Score

Allocation = dict[str, int]
_TRIES = 20  # for a mutation that keeps to the bytes


@dataclass(frozen=True)
class Stage:
    """One step of selection: score on `tokens` tokens, keep the best `survivors`."""

    tokens: int
    survivors: int


@dataclass(frozen=True)
class Evolved:
    """The best allocation, its damage on the last stage's tokens, and the start's on the same.

    history: the parent's damage after each generation.
    """

    allocation: Allocation
    damage: float
    start_damage: float
    history: tuple[float, ...]


def evolve(
    options: Mapping[str, Sequence[Option]],
    start: Mapping[str, int],
    nbytes: int,
    score: Score,
    *,
    generations: int,
    stages: Sequence[Stage],
    offspring: int = 16,
    floor: Mapping[str, int] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Evolved:
    """Search allocations of at most `nbytes` for the least `score(allocation, tokens)`, in nats.

    Each generation mutates the parent (`mutate`) into `offspring` children. Stages of rising tokens
    leave fewer and fewer of them; in the last the parent competes, so damage on its tokens never
    rises. floor: the least option of each target. start must keep to both.
    """
    if not stages or any(stage.survivors < 1 for stage in stages):
        raise PliantError("evolution needs a stage, and a survivor of each")
    least = dict.fromkeys(options, 0) | dict(floor or {})
    if size(options, start) > nbytes or any(start[t] < least[t] for t in options):
        raise PliantError("the start of an evolution must keep to its bytes and its floor")
    chooser = random.Random(seed)
    parent = {target: start[target] for target in sorted(options)}
    final = stages[-1].tokens
    damage = first = score(parent, final)
    history = []
    for generation in range(generations):
        children: list[Allocation] = []
        for _ in range(offspring):
            child = mutate(options, parent, nbytes, least, chooser)
            if child != parent and child not in children:
                children.append(child)
        for stage in stages[:-1]:
            scored = [(score(child, stage.tokens), i) for i, child in enumerate(children)]
            children = [children[i] for _, i in sorted(scored)[: stage.survivors]]
        for child in children:
            found = score(child, final)
            if found < damage:
                parent, damage = child, found
        history.append(damage)
        if progress is not None:
            progress(generation + 1, generations)
    return Evolved(parent, damage, first, tuple(history))


def mutate(
    options: Mapping[str, Sequence[Option]],
    parent: Mapping[str, int],
    nbytes: int,
    floor: Mapping[str, int],
    chooser: random.Random,
) -> Allocation:
    """One to three level switches: a target goes up, others go down until the bytes hold again.

    What is left of the bytes then goes to others, in random order, so that a child is as large as
    its parent but for less than one move. Targets that moved are left alone. The parent itself when
    no switch was found.
    """
    child = dict(parent)
    for _ in range(min(chooser.randint(1, 3), chooser.randint(1, 3))):
        child = _switch(options, child, nbytes, floor, chooser)
    return child


def _switch(
    options: Mapping[str, Sequence[Option]],
    allocation: Allocation,
    nbytes: int,
    floor: Mapping[str, int],
    chooser: random.Random,
) -> Allocation:
    targets = sorted(options)
    used = size(options, allocation)
    for _ in range(_TRIES):
        child, left = dict(allocation), nbytes - used
        raised = [t for t in targets if child[t] + 1 < len(options[t])]
        if not raised:
            return allocation
        up = chooser.choice(raised)
        left -= _step(options, child, up, 1)
        moved = {up}
        order = chooser.sample(targets, len(targets))
        for down in order:
            if left >= 0:
                break
            if down not in moved and child[down] > floor[down]:
                left -= _step(options, child, down, -1)
                moved.add(down)
        if left < 0:
            continue
        for target in chooser.sample(targets, len(targets)):
            if target in moved or child[target] + 1 >= len(options[target]):
                continue
            at = child[target]
            if options[target][at + 1].nbytes - options[target][at].nbytes <= left:
                left -= _step(options, child, target, 1)
        return child
    return allocation


def _step(
    options: Mapping[str, Sequence[Option]], allocation: Allocation, target: str, by: int
) -> int:
    """Move one target in place; the bytes that it takes more."""
    before = options[target][allocation[target]].nbytes
    allocation[target] += by
    return options[target][allocation[target]].nbytes - before


def size(options: Mapping[str, Sequence[Option]], allocation: Mapping[str, int]) -> int:
    """Bytes of an allocation."""
    return sum(options[target][index].nbytes for target, index in allocation.items())
