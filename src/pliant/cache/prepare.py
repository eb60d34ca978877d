"""Codings of keys and values fitted once to a model, not to what each sequence begins with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pliant.cache.codings import Coding
from pliant.cache.limited import LimitedModel
from pliant.cache.policies.coded import Coded
from pliant.cache.policy import Layer, Policy
from pliant.errors import PliantError


def prepare(
    model: Any,
    make: Callable[..., Policy],
    ids: Tensor,  # [windows, tokens]
    chunk: int = 256,
) -> list[tuple[Coding, Coding]]:
    """What a coding policy's option `prepared` takes: `make` fitted to all of `ids`.

    make: the policy with its other options, say `functools.partial(KVQuant, bits=3)`.
    """

    def patient(layer: Layer) -> Policy:
        return make(layer, fit=ids.numel())  # more than it will ever have seen

    limited = LimitedModel(model, patient)
    windows: list[list[Coded]] = []
    for window in ids:
        limited.reset()
        for part in window.split(chunk):
            limited(part, last=1)
        windows.append([_coded(policy) for policy in limited.policies])
    return [_fitted([policies[i] for policies in windows]) for i in range(len(windows[0]))]


def _fitted(of_windows: list[Coded]) -> tuple[Coding, Coding]:
    first, *others = of_windows
    sides = [policy.seen() for policy in of_windows]
    for policy in others:
        first.join(policy)
    first.learn(*(torch.cat(side, 1) for side in zip(*sides, strict=True)))
    return first.keys, first.values


def _coded(policy: Policy) -> Coded:
    if not isinstance(policy, Coded):
        raise PliantError(f"{type(policy).__name__} has no codings to fit")
    return policy
