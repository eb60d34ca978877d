"""Attention of many sequences at once over the pages that hold their keys and values.

Sequences with one new token (decode) are taken together: where their pages begin alike, that
beginning is read once for all of them, as in "RelayAttention for Efficient Large Language Model
Serving with Long System Prompts", and one softmax runs over it and over what each has of its own.
A sequence with several (prefill), or without another of about its length, attends by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pliant.cache.encoding import PageShape, decode
from pliant.cache.pages import Page, PagePool
from pliant.cache.sequence import PagedSequence

GROUP_TOKENS = 4096
"""Tokens of padded tails that decoding sequences gather at once: 6 MiB in SmolLM2 in 32 bits."""

_Placed = tuple[PagedSequence, int]  # a sequence with one new token, and its place in the pass


class Gather:
    """Pages in a row, of any bits, of which each layer is read in turn."""

    def __init__(self, pool: PagePool, pages: Sequence[Page]) -> None:
        self.shape, self.pages = pool.shape, pages
        places: dict[int, list[int]] = {}
        for place, page in enumerate(pages):
            places.setdefault(page.bits, []).append(place)
        self._places = places  # bits -> which pages

    def layer(self, layer: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys [tokens, kv_heads, key_dim] and values of all pages in one layer."""
        shape, parts = self.shape, [page.data[layer] for page in self.pages]
        if set(self._places) == {shape.bits}:
            rows = torch.cat(parts).to(dtype)
        else:
            rows = self._decoded(parts, dtype).flatten(0, 1)
        return (
            rows[:, : shape.keys].view(-1, shape.kv_heads, shape.key_dim),
            rows[:, shape.keys :].view(-1, shape.kv_heads, shape.value_dim),
        )

    def _decoded(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """[pages, tokens, width]; pages of the same bits are decoded together."""
        size = (len(parts), self.shape.tokens, self.shape.width)
        out = parts[0].new_empty(size, dtype=dtype)
        for bits, places in self._places.items():
            some = torch.stack([parts[place] for place in places])
            if bits != self.shape.bits:
                some = decode(some, self.shape, bits, dtype)
            out[torch.tensor(places, device=out.device)] = some.to(dtype)
        return out


@dataclass(frozen=True)
class _Alone:
    """A sequence whose new tokens are `start` to `stop` of the pass.

    seen [new, length]: what each of them sees of the sequence.
    """

    start: int
    stop: int
    pages: Gather
    seen: Tensor

    def attend(self, layer: int, queries: Tensor, scale: float) -> Tensor:
        """What `queries` [new, heads, key_dim] find, [new, heads, value_dim]."""
        length = self.seen.shape[1]
        keys, values = (
            side[:length].transpose(0, 1) for side in self.pages.layer(layer, queries.dtype)
        )
        found = F.scaled_dot_product_attention(
            queries.transpose(0, 1)[None],
            keys[None],
            values[None],
            self.seen,
            scale=scale,
            enable_gqa=True,
        )
        return found[0].transpose(0, 1)


@dataclass(frozen=True)
class _Group:
    """Sequences with one new token each.

    rows: their places in the pass. shared: pages that all begin with, or None. tails: the other
    pages of each, padded to as many. seen [sequences, tokens of a tail]: which are not padding.
    """

    rows: Tensor
    shared: Gather | None
    tails: Gather
    seen: Tensor

    def attend(self, layer: int, queries: Tensor, scale: float) -> Tensor:
        """What `queries` [sequences, heads, key_dim] find, [sequences, heads, value_dim]."""
        keys, values = (
            side.view(*self.seen.shape, *side.shape[1:]).transpose(1, 2)
            for side in self.tails.layer(layer, queries.dtype)
        )  # [sequences, kv_heads, tokens, dim]
        seen = self.seen[:, None, None]
        if self.shared is None:
            found = F.scaled_dot_product_attention(
                queries[:, :, None], keys, values, seen, scale=scale, enable_gqa=True
            )
            return found[:, :, 0]
        count, heads, size = queries.shape
        kv_heads = keys.shape[1]
        each = queries.view(count, kv_heads, heads // kv_heads, size)
        once = each.transpose(0, 1).reshape(kv_heads, -1, size)  # all sequences' queries of a key
        shared_keys, shared_values = (
            side.transpose(0, 1) for side in self.shared.layer(layer, queries.dtype)
        )
        shared = (once @ shared_keys.transpose(1, 2)).view(kv_heads, count, -1, len(shared_keys[0]))
        own = (each @ keys.transpose(2, 3)).masked_fill(~seen, -torch.inf)
        scores = torch.cat([shared.transpose(0, 1), own], -1).float() * scale
        weights = scores.softmax(-1).to(values.dtype)
        of_shared = weights[..., : shared.shape[-1]].transpose(0, 1)
        of_own = weights[..., shared.shape[-1] :]
        from_shared = of_shared.reshape(kv_heads, -1, shared.shape[-1]) @ shared_values
        from_shared = from_shared.view(kv_heads, count, -1, values.shape[-1]).transpose(0, 1)
        return torch.flatten(from_shared + of_own @ values, 1, 2)


class PagedBatch:
    """The new tokens of some sequences, in one pass of `sum(counts)` tokens.

    sequences: of one pool, already extended by their `counts` new tokens each.
    """

    def __init__(
        self, pool: PagePool, sequences: Sequence[PagedSequence], counts: Sequence[int]
    ) -> None:
        self.pool, self.shape = pool, pool.shape
        self._sizes: list[int] = []
        self._alone: list[_Alone] = []
        place, views = 0, []
        decoding: list[_Placed] = []
        for sequence, count in zip(sequences, counts, strict=True):
            for page, first, last in sequence.spans(len(sequence) - count):
                views.append(page.data[:, first:last].unbind(0))
                self._sizes.append(last - first)
            if count == 1:
                decoding.append((sequence, place))
            else:
                self._alone.append(self._by_itself(sequence, place, count))
            place += count
        self._targets = list(zip(*views, strict=True))  # of each layer: where new rows go
        self._groups: list[_Group] = []
        for members, shared in _grouped(decoding, self.shape):
            if len(members) > 1:
                self._groups.append(self._together(members, shared))
            else:
                self._alone.append(self._by_itself(*members[0], 1))

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None
    ) -> Tensor:
        """Store `key` and `value` [1, kv_heads, total, dim] of one layer; what `query` [1, heads,
        total, key_dim] finds in each sequence, [1, total, heads, value_dim].
        """
        rows = torch.cat([side[0].transpose(0, 1).flatten(1) for side in (key, value)], dim=-1)
        parts = torch.split(rows.to(self.shape.dtype), self._sizes)
        for target, part in zip(self._targets[layer], parts, strict=True):
            target.copy_(part)
        queries = query[0].transpose(0, 1)  # [total, heads, key_dim]
        out = queries.new_empty(*queries.shape[:2], self.shape.value_dim)
        scale = self.shape.key_dim**-0.5 if scaling is None else scaling
        for one in self._alone:
            out[one.start : one.stop] = one.attend(layer, queries[one.start : one.stop], scale)
        for group in self._groups:
            out[group.rows] = group.attend(layer, queries[group.rows], scale)
        return out[None]

    def _by_itself(self, sequence: PagedSequence, place: int, count: int) -> _Alone:
        length, device = len(sequence), self.pool.device
        last = torch.arange(length - count, length, device=device)
        seen = torch.arange(length, device=device) <= last[:, None]
        return _Alone(place, place + count, Gather(self.pool, sequence.pages), seen)

    def _together(self, members: Sequence[_Placed], shared: int) -> _Group:
        device, size = self.pool.device, self.shape.tokens
        tails = [sequence.pages[shared:] for sequence, _ in members]
        longest = max(map(len, tails))
        padded = [page for tail in tails for page in tail + tail[-1:] * (longest - len(tail))]
        lengths = torch.tensor([len(s) - shared * size for s, _ in members], device=device)
        return _Group(
            torch.tensor([place for _, place in members], device=device),
            Gather(self.pool, members[0][0].pages[:shared]) if shared else None,
            Gather(self.pool, padded),
            torch.arange(longest * size, device=device) < lengths[:, None],
        )


def _grouped(decoding: Sequence[_Placed], shape: PageShape) -> list[tuple[list[_Placed], int]]:
    """Sequences to take together, and how many pages at their beginning are the same.

    Those that begin alike go together; the others by length, none padded to more than twice its
    own pages. A group's padded tails have at most GROUP_TOKENS, unless one alone has more.
    """
    alike: dict[Page, list[_Placed]] = {}
    for item in decoding:
        alike.setdefault(item[0].pages[0], []).append(item)
    single = [members[0] for members in alike.values() if len(members) == 1]
    families = [(members, _common(members)) for members in alike.values() if len(members) > 1]
    groups: list[tuple[list[_Placed], int]] = []
    for members, shared in [*families, (single, 0)]:
        group: list[_Placed] = []
        for item in sorted(members, key=lambda item: len(item[0].pages)):
            pages = len(item[0].pages) - shared
            large = (len(group) + 1) * pages * shape.tokens > GROUP_TOKENS
            uneven = group and not shared and pages > 2 * len(group[0][0].pages)
            if group and (large or uneven):
                groups.append((group, shared))
                group = []
            group.append(item)
        if group:
            groups.append((group, shared))
    return groups


def _common(members: Sequence[_Placed]) -> int:
    """Pages that all of them begin with; the last page of each, just written to, is its own."""
    count = 0
    for pages in zip(*(sequence.pages[:-1] for sequence, _ in members), strict=False):
        if any(page is not pages[0] for page in pages):
            break
        count += 1
    return count
