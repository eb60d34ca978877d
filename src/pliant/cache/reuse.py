"""Keys and values of known text used again: at another place, behind other text, or edited.

A `Passage` is computed once. Passages that were computed alone can be put behind one another
(`assembled`): none has seen what stands before it, only what follows sees them all, as
"Block-Attention for Efficient RAG" does with models trained for it. In a passage a span can be
replaced, inserted or deleted (`edited`): the new span alone is computed, and what stands behind it
keeps its values and has its keys turned to their new places, as "Let the Code LLM Edit Itself When
You Edit the Code" does. Keys must carry their positions by rotary embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pliant.cache.limited import LimitedModel
from pliant.cache.policies.keep import Keep
from pliant.cache.policy import Entries
from pliant.cache.rotary import Rotary
from pliant.errors import PliantError, UnsupportedModelError


@dataclass(frozen=True)
class Passage:
    """Tokens [n], each layer's entries for them, and the position of the first."""

    tokens: Tensor
    layers: tuple[Entries, ...]
    start: int = 0

    def __len__(self) -> int:
        return len(self.tokens)

    def part(self, start: int, stop: int) -> Passage:
        """Its tokens from `start` to before `stop`, where they are."""
        layers = tuple(
            Entries(e.keys[:, start:stop], e.values[:, start:stop], e.positions[:, start:stop])
            for e in self.layers
        )
        return Passage(self.tokens[start:stop], layers, self.start + start)

    def at(self, start: int, rotary: Rotary) -> Passage:
        """The same at another position: keys turned, values as they are."""
        by = start - self.start
        if not by:
            return self
        layers = []
        for entries in self.layers:
            keys = rotary.shift(entries.keys, torch.full_like(entries.positions, by))
            layers.append(Entries(keys, entries.values, entries.positions + by))
        return Passage(self.tokens, tuple(layers), start)


def read(model: Any, tokens: Sequence[int] | Tensor, behind: Passage | None = None) -> Passage:
    """`tokens` [n] computed by a transformers model: alone, or behind a passage that begins at 0.

    What comes back is of `tokens` alone. Keys and values are kept in bfloat16.
    """
    limited = LimitedModel(model, Keep)
    if behind is not None:
        fill(limited, behind)
    first = limited.length
    limited(tokens, last=1)
    layers = tuple(policy.entries for policy in _keeping(limited))
    ids = torch.as_tensor(tokens)
    seen = ids if behind is None else torch.cat([behind.tokens, ids])
    return Passage(seen, layers).part(first, limited.length)


def fill(limited: LimitedModel, passage: Passage) -> None:
    """Let `limited`, which has read nothing and whose policies are `keep`, go on behind it."""
    if limited.length or passage.start:
        raise PliantError(
            f"a passage from position {passage.start} cannot go behind {limited.length} tokens; "
            "put passages together first"
        )
    for policy, entries in zip(_keeping(limited), passage.layers, strict=True):
        policy.kept = entries if len(entries) else None
    limited.length = len(passage)


def assembled(model: Any, passages: Sequence[Passage]) -> Passage:
    """`passages` one behind another from position 0, each with its keys turned to its place."""
    rotary, placed, length = _rotary(model), [], 0
    for passage in passages:
        placed.append(passage.at(length, rotary))
        length += len(passage)
    return _joined(placed)


def edited(
    model: Any, passage: Passage, start: int, stop: int, tokens: Sequence[int] | Tensor = ()
) -> Passage:
    """`passage` with what stands from `start` to before `stop` replaced by `tokens`.

    Computed are `tokens` alone, behind what stands before them. What stands behind has still seen
    the old text. Several edits are made one after the other, the last one in the text first.
    """
    if passage.start or not 0 <= start <= stop <= len(passage):
        raise PliantError(
            f"no span from {start} to {stop} in {len(passage)} tokens from {passage.start}; give a "
            "span inside of a passage that begins at 0"
        )
    new, old = torch.as_tensor(tokens, dtype=torch.long), passage.tokens[start:stop]
    if torch.equal(new, old):
        return passage
    before, behind = passage.part(0, start), passage.part(stop, len(passage))
    parts = [before]
    if len(new):
        parts.append(read(model, new, before if start else None))
    parts.append(behind.at(start + len(new), _rotary(model)))
    return _joined(parts)


def _joined(parts: Sequence[Passage]) -> Passage:
    layers = tuple(Entries.cat(list(own)) for own in zip(*(p.layers for p in parts), strict=True))
    return Passage(torch.cat([part.tokens for part in parts]), layers, parts[0].start)


def _keeping(limited: LimitedModel) -> list[Keep]:
    found = [policy for policy in limited.policies if type(policy) is Keep]
    if len(found) != len(limited.policies):
        raise PliantError("passages go into caches of the policy keep alone")
    return found


def _rotary(model: Any) -> Rotary:
    rotary = Rotary.of(model)
    if rotary is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no rotary embedding of one kind, so its keys cannot be "
            "moved to other positions"
        )
    return rotary
