"""Decode speed before it is measured: the products of a token, and what lies between them.

A token's seconds are a sum. Each matrix costs what a product with its kind of code at its shape was
measured to cost on this machine, read from memory beyond the last-level cache. Everything else
(norms, attention, positions, calls) is a part a token, a part a layer, and a part a layer and
cached token, taken from models of the same architecture in one kind of code: what their tokens
take over the products that they are made of. No speed is assumed; `pliant.bench` measures them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pliant.plan.memory import text_config


@dataclass(frozen=True)
class Product:
    """One vector a sequence times a code of `kind`, [out, width].

    count: how often a token does it; below 1 for an expert that only some tokens choose.
    """

    kind: str
    out: int
    width: int
    count: float = 1.0

    @property
    def key(self) -> str:
        return f"{self.out}x{self.width} {self.kind}"


@dataclass(frozen=True)
class Between:
    """Seconds beside the products: of a layer, of a layer for each token in its cache, of a token.

    The last is 0 where models of all layers were timed.
    """

    layer: float
    position: float
    token: float = 0.0


@dataclass(frozen=True)
class Costs:
    """Seconds of products (by `Product.key`) and between them, for each way to run a model.

    ways: by name, in order of preference. A model runs the first way that knows all its products:
    the whole step in one native call, else module by module.
    """

    layers: int
    ways: Mapping[str, tuple[Mapping[str, float], Between]]

    def seconds(self, products: Iterable[Product], position: int) -> float | None:
        """Of one token of each sequence with `position` tokens cached; None if no way knows."""
        wanted = list(products)
        for known, between in self.ways.values():
            if all(product.key in known for product in wanted):
                inside = sum(known[product.key] * product.count for product in wanted)
                layer = between.layer + between.position * position
                return inside + between.token + self.layers * layer
        return None


def kind_of(meta: Mapping[str, Any]) -> str:
    """What two codes of different shapes share: the description on disk without its sizes."""
    return json.dumps(_bare(meta), sort_keys=True, separators=(",", ":"))


def _bare(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _bare(v) for k, v in value.items() if k not in ("shape", "seed")}
    if isinstance(value, (list, tuple)):
        return [_bare(part) for part in value]
    return value


def reads(config: Any, kind: str, tied: bool) -> float:
    """How often a token multiplies a target: never an untied input embedding, some experts."""
    if kind == "embedding":
        return 1.0 if tied else 0.0
    if kind != "expert":
        return 1.0
    text = text_config(config)
    chosen = _first(text, "num_experts_per_tok", "num_experts_per_token", "moe_topk")
    among = _first(text, "num_local_experts", "num_experts", "n_routed_experts")
    return min(1.0, chosen / among) if chosen and among else 1.0


def _first(config: Any, *names: str) -> Any:
    return next((v for n in names if (v := getattr(config, n, None))), None)
