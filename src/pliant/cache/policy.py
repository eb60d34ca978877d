"""The interface of KV policies: what one layer of one sequence keeps of the tokens it has seen.

A policy is a class with a name in the catalog, one file each in `pliant.cache.policies`. For each
chunk of new tokens attention calls, in this order,

    add(new, queries)      the chunk's own keys and values, which its queries must see
    read(queries)          what the queries attend to
    observe(weights)       what they made of it, if the policy sets `observes`
    settle()               time to encode, evict or merge, down to what the policy may keep

and `nbytes` is what is left, every byte that must stay until the next chunk.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from pliant.cache.rotary import Rotary
from pliant.errors import PliantError

STORED = torch.bfloat16
"""What a key or a value that is not coded is kept as."""


@dataclass(frozen=True)
class Layer:
    """The layer that a policy serves.

    index: from 0. rotary: how its keys carry their positions, None where they do not.
    scale: of scores before the softmax.
    """

    index: int
    layers: int
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    rotary: Rotary | None
    scale: float


@dataclass(frozen=True)
class Entries:
    """Keys and values that can be attended to, each head's own.

    keys [kv_heads, n, key_dim], after rotary embedding; values [kv_heads, n, value_dim];
    positions [kv_heads, n]: of the tokens; a query sees those up to its own. bias [kv_heads, n] or
    None: added to scores, the logarithm of how many tokens an entry stands for.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    bias: Tensor | None = None

    def __len__(self) -> int:
        """Entries of each head."""
        return int(self.keys.shape[1])

    def take(self, index: Tensor) -> Entries:
        """Entries `index` [kv_heads, m] of each head, in that order."""

        def rows(states: Tensor) -> Tensor:
            return states.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))

        bias = None if self.bias is None else self.bias.gather(1, index)
        return Entries(rows(self.keys), rows(self.values), self.positions.gather(1, index), bias)

    @staticmethod
    def cat(parts: list[Entries]) -> Entries:
        """All of `parts`, one after the other."""
        bias = None
        if any(part.bias is not None for part in parts):
            bias = torch.cat([
                part.keys.new_zeros(part.positions.shape) if part.bias is None else part.bias
                for part in parts
            ], 1)  # fmt: skip
        return Entries(
            torch.cat([part.keys for part in parts], 1),
            torch.cat([part.values for part in parts], 1),
            torch.cat([part.positions for part in parts], 1),
            bias,
        )


class Policy(ABC):
    """What one layer of one sequence keeps. Options are keywords with defaults.

    observes: whether `observe` wants the attention weights, which costs writing them out.
    """

    observes: ClassVar[bool] = False

    def __init__(self, layer: Layer) -> None:
        self.layer = layer

    @abstractmethod
    def add(self, new: Entries, queries: Tensor) -> None:
        """Take in a chunk; queries [heads, tokens, key_dim], after rotary embedding."""

    @abstractmethod
    def read(self, queries: Tensor) -> Entries:
        """What `queries` [heads, tokens, key_dim] attend to, in their dtype, the chunk included."""

    def observe(self, weights: Tensor) -> None:  # noqa: B027 (most have nothing to learn)
        """Attention weights [heads, tokens, entries] over what `read` gave."""

    def settle(self) -> None:  # noqa: B027 (some keep all)
        """Come down to what may be kept."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that are kept from one chunk to the next."""

    @property
    def read_bytes(self) -> int:
        """Bytes that the last `read` went through: all, but for policies that choose."""
        return self.nbytes

    def per_kv_head(self, weights: Tensor) -> Tensor:
        """[heads, ...] summed over the query heads of each key head, [kv_heads, ...]."""
        return weights.view(self.layer.kv_heads, -1, *weights.shape[1:]).sum(1)

    def needs_rotary(self) -> Rotary:
        """The layer's rotary embedding; PliantError where keys carry no such positions."""
        if self.layer.rotary is None:
            raise PliantError(
                f"the policy {type(self).__name__} turns keys to other positions, and this "
                "model's keys have no rotary embedding"
            )
        return self.layer.rotary


@dataclass(frozen=True)
class PolicyInfo:
    """One policy of the catalog. kind: quantize, sparsify, evict, merge, factorize, retrieve..."""

    name: str
    kind: str
    paper: str
    make: Callable[..., Policy]

    @property
    def summary(self) -> str:
        """First line of its docstring."""
        return (inspect.getdoc(self.make) or "").split("\n")[0]

    @property
    def options(self) -> dict[str, Any]:
        """Keyword options and their defaults."""
        return {
            p.name: p.default
            for p in inspect.signature(self.make).parameters.values()
            if p.kind is inspect.Parameter.KEYWORD_ONLY
        }


_CATALOG: dict[str, PolicyInfo] = {}
P = TypeVar("P", bound=type[Policy])


def policy(name: str, *, kind: str, paper: str) -> Callable[[P], P]:
    """Record a policy in the catalog; the class itself is returned unchanged."""

    def record(made: P) -> P:
        _CATALOG[name] = PolicyInfo(name, kind, paper, made)
        return made

    return record


def policies() -> dict[str, PolicyInfo]:
    """Every policy by name, sorted."""
    _import_all()
    return dict(sorted(_CATALOG.items()))


def find_policy(name: str) -> PolicyInfo:
    """The policy called `name`; PliantError lists the known ones when there is none."""
    _import_all()
    if name not in _CATALOG:
        raise PliantError(f"no KV policy is called {name!r}; known: {', '.join(policies())}")
    return _CATALOG[name]


@cache
def _import_all() -> None:
    package = importlib.import_module("pliant.cache.policies")
    for module in pkgutil.iter_modules(package.__path__, "pliant.cache.policies."):
        importlib.import_module(module.name)
