"""The one budget of a served model: weights and KV pages in it, and the moves between them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from pliant.budget import format_size
from pliant.cache import PagedSequence, PagePool, PageShape, PrefixTree
from pliant.cache.cold import hot_tokens, make_room, room_in
from pliant.errors import BudgetError, PliantError
from pliant.ladder import Artifact
from pliant.ladder.live import Plan
from pliant.plan.joint import CacheCost, Demand, JointPlan
from pliant.plan.memory import PREFILL_CHUNK, serving_bytes
from pliant.serve.decisions import DecisionLog
from pliant.serve.governor import Governor

SLICE_SECONDS = 0.02
"""The least time between two passes that is spent on moving weights or coding pages, where there
is something to move; at most as long as a pass takes."""

LOOK_SECONDS = 0.1  # between two looks at the demand
SHARE_DAMAGE = 0.05
IDLE_TOKENS = 1024
"""Weights leave room for a request of so many tokens even where nobody asks for it."""

Wanted = Callable[[], tuple[Sequence[int], int]]
"""Lengths that sequences will have, and how many tokens several of them share."""


class Room:
    """Weights and pages of a RunningModel in `memory` bytes, parted as its governor says.

    memory: without it, what the model was opened for. most: sequences that run at once.
    share_damage: nats a token that running more may add. fixed: the weights stay as they are.
    Weights and pages never take more than the budget, but while it is being lowered.
    """

    def __init__(
        self,
        model: Any,
        memory: int | None,
        most: int,
        log: DecisionLog,
        share_damage: float = SHARE_DAMAGE,
        fixed: bool = False,
    ) -> None:
        self._model, self._log, self.most = model, log, most
        config, context = model.config, model.plan.context
        device = model.get_input_embeddings().weight.device
        self.shape = PageShape.of(config)
        self.reserved = serving_bytes(config, context, most, model.compute_dtype.itemsize)
        frontier: Iterable[tuple[int, float]] = model.artifact.ladder.frontier()
        if fixed:
            frontier = [(self.weights, model.artifact.ladder.damage_at(self.weights))]
        self.plan = JointPlan(frontier, cache_cost(model.artifact, self.shape))
        self.governor = Governor(self.plan, share_damage)
        self.least = self.reserved + self.plan.smallest + self.plan.cost.nbytes(self._one(context))
        full = self.plan.cost.full_bytes * most * context
        self.useful = self.reserved + self.plan.largest + full
        self.pool = PagePool(self.shape, 0, device)
        self.tree = PrefixTree(self.pool)
        self.version = 0
        """Grows whenever weights change: keys and values of other weights are not for newcomers."""
        self._moving: Iterator[Plan] | None = None
        self._goal = self.weights
        self._looked = 0.0
        self._failed = False  # the last move of weights
        self._wanted = self._idle = self._one(min(context, IDLE_TOKENS))
        self.memory = 0
        if memory is None:
            one = self.plan.cost.nbytes(self._one(context), self.shape.bits)
            pages = max(model.plan.breakdown.kv_cache, one)
            memory = self.reserved + self.weights + pages
        self.set_memory(memory, "as started")

    @property
    def weights(self) -> int:
        """Bytes of weights now."""
        return int(self._model.plan.weight_bytes)

    @property
    def held(self) -> int:
        """Bytes of weights and pages now, and what is set aside for activations."""
        return self.weights + self.pool.nbytes + self.reserved

    @property
    def over(self) -> bool:
        """Whether more is held than the budget allows, which then was just lowered."""
        return self.held > self.memory

    @property
    def could_grow(self) -> bool:
        """Whether weights are not as large as they would be with nobody there."""
        return not self._failed and self.weights < min(self.plan.largest, self._alone_weights())

    @property
    def sinking(self) -> bool:
        """Whether more is held than is going to be."""
        return self.over or self._goal < self.weights

    def set_memory(self, memory: int, reason: str) -> None:
        """Take another budget; moves follow. BudgetError for one that holds no request."""
        if memory < self.least:
            raise BudgetError(
                f"{format_size(memory)} is less than this server needs: {format_size(self.least)} "
                f"({self.least} bytes) for its smallest weights, activations and one request of "
                f"{self._model.plan.context:,} tokens"
            )
        if memory != self.memory:
            was = f" from {format_size(self.memory)}" if self.memory else ""
            self._log.add(f"budget{was} to {format_size(memory)}", reason)
        self.memory = memory
        self._looked, self._failed = 0.0, False
        if self._goal > self.weights:  # it may not have the room any more
            self._moving, self._goal = None, self.weights
        self._bound()

    def demand(self, lengths: Sequence[int], shared: int = 0) -> Demand:
        """See demand_of."""
        return demand_of(self.shape, lengths, shared)

    def admits(self, lengths: Sequence[int], shared: int = 0) -> bool:
        """Whether sequences that will be so long may run together; the first always may."""
        if len(lengths) > self.most:
            return False
        if len(lengths) < 2:
            return True
        available = self.memory - self.reserved
        alone = self.demand([max(lengths)])
        return self.governor.admits(available, self.demand(lengths, shared), alone)

    def govern(self, wanted: Wanted, seconds: float) -> None:
        """Look at the demand now and then, and move on towards what was ordered.

        seconds: for moves now.
        """
        if time.monotonic() - self._looked >= LOOK_SECONDS:
            self._look(wanted)
        self._move(seconds)

    def hurry(self, wanted: Wanted) -> bool:
        """Look at the demand now, and make what is ordered at once; whether weights shrank."""
        before = self.weights
        self._look(wanted)
        self._move(math.inf)
        return self.weights < before

    def make(
        self, wanted: int, sequences: Sequence[PagedSequence], seconds: float = math.inf
    ) -> bool:
        """Try to have `wanted` bytes free for pages: finish moves of weights, code cold pages."""
        if self._goal < self.weights:
            self._move(seconds, wanted)
        short = wanted - self.pool.free
        if short > 0:
            short -= self.tree.evict(short)
        if short > 0:
            make_room(self.pool, sequences, short, self.plan.cost.widths, seconds)
        return self.pool.free >= wanted

    def could_make(self, sequences: Sequence[PagedSequence]) -> int:
        """Bytes that pages could have now: free, idle, or freed by coding cold ones."""
        narrowest = room_in(self.pool, sequences, self.plan.cost.widths[-1])
        return self.pool.free + self.tree.evictable + narrowest

    def status(self) -> dict[str, Any]:
        """The fields of Status that tell of memory."""
        rest = np.array([self.memory - self.reserved - self.weights])
        damage = float(self.plan.cost.damage(self._wanted, rest)[0])
        return {
            "memory": self.memory,
            "planned": self.memory,
            "weights": self.weights,
            "cache": self.pool.nbytes,
            "activations": self.reserved,
            "free": max(self.memory - self.held, 0),
            "least": self.least,
            "most": self.useful,
            "damage": self.plan.weight_damage(self.weights),
            "cache_damage": damage if math.isfinite(damage) else None,
            "pages": self.pool.widths(),
            "moves": self.version,
        }

    def _one(self, tokens: int) -> Demand:
        return self.demand([tokens])

    def _alone_weights(self) -> int:
        """Bytes of the weights when nobody asks for anything."""
        split = self.plan.split(self.memory - self.reserved, self._idle)
        return self.weights if split is None else split.weights

    def _look(self, wanted: Wanted) -> None:
        self._looked = time.monotonic()
        asked = self.demand(*wanted())
        self._wanted = Demand(max(asked.cold, self._idle.cold), max(asked.hot, self._idle.hot))
        if self._failed:
            return
        order = self.governor.order(self.memory - self.reserved, self._wanted, self.weights)
        if order is None:
            return
        ladder = self._model.artifact.ladder
        goal = ladder.bytes_of(ladder.allocation(order.weights))
        if goal not in (self.weights, self._goal):
            sizes = f"from {format_size(self.weights)} to {format_size(goal)}"
            self._log.add(f"weights {sizes}", order.reason)
            self._goal, self._moving = goal, self._model.moves(goal)

    def _move(self, seconds: float, wanted: int = 0) -> None:
        """Move weights for so long, or until `wanted` bytes are free for pages."""
        if self._moving is None:
            return
        self._bound()
        if self._goal > self.weights and self.pool.free < 0:
            return  # pages have to make room first
        until = time.monotonic() + seconds
        try:
            for _ in self._moving:
                self._changed()
                if time.monotonic() > until or (wanted and self.pool.free >= wanted):
                    return
        except PliantError as error:
            self._failed = True
            self._log.add("weights stay as they are", str(error))
        self._moving, self._goal = None, self.weights
        self._bound()

    def _changed(self) -> None:
        self.version += 1
        self.tree.clear()
        self._bound()

    def _bound(self) -> None:
        """Give pages what the weights leave, on their way up what they are going to leave."""
        self.pool.budget = max(self.memory - self.reserved - max(self.weights, self._goal), 0)


def demand_of(shape: PageShape, lengths: Sequence[int], shared: int = 0) -> Demand:
    """Of sequences that will be so long, of which `shared` tokens are held for several.

    Whole pages are counted, and a chunk of a prompt that is being read, which cannot be coded yet.
    """
    whole = [shape.pages(length) * shape.tokens for length in lengths]
    total = max(sum(whole) - shared, 0)
    hot = min(sum(hot_tokens(shape, length) for length in whole) + PREFILL_CHUNK, total)
    return Demand(total - hot, hot)


def cache_cost(artifact: Artifact, shape: PageShape) -> CacheCost:
    """What a token takes and costs by width; 16 bits alone where nothing was measured."""
    record = artifact.cache_record()
    damages = {} if record is None else record.damage
    widths = {shape.bits, *damages}
    return CacheCost({bits: -(-shape.nbytes(bits) // shape.tokens) for bits in widths}, damages)
