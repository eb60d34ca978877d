"""Widths for the axes of all layers' keys and values together, by what their errors cost.

To second order the damage of errors e is the mean of (g . e)^2 / 2, with g the gradient of the
log-probability of a token that the model itself would draw: Fisher's information. One backward
pass over some text gives it for every channel of every layer's keys and values in one unit, so
that one price a bit decides all widths: reverse water-filling over the whole cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from pliant.cache.codings import Coding, Transform
from pliant.cache.encoding import PageShape
from pliant.cache.rotary import Rotary
from pliant.errors import PliantError
from pliant.plan.memory import text_config

_SEEN = "pliant_seen"
_kept: ContextVar[list[tuple[Tensor, Tensor]]] = ContextVar("pliant_seen_states")


def mixed(
    model: Any,
    ids: Tensor,  # [windows, tokens]
    bits: float,
    seed: int = 0,
) -> list[tuple[Coding, Coding]]:
    """Codings for the policy waterfill's `prepared`, of `bits` a number over the whole cache."""
    sides = states_and_costs(model, ids, seed)
    codings = []
    for _, costs in sides:
        coding = Transform(bits)
        coding.metric = costs
        codings.append(coding)
    gains = torch.cat([
        coding.gains(states.float()).flatten()
        for coding, (states, _) in zip(codings, sides, strict=True)
    ])  # fmt: skip
    numbers = sum(costs.numel() for _, costs in sides)
    price = float(gains.topk(max(1, round(bits * numbers))).values[-1])
    for coding, (states, _) in zip(codings, sides, strict=True):
        coding.price = price
        coding.fit(states.float())
    return list(zip(codings[::2], codings[1::2], strict=True))


def states_and_costs(model: Any, ids: Tensor, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Of each layer's keys, then values: states bfloat16 [kv_heads, n, dim], and what errors cost.

    Keys are before rotary embedding. Costs [kv_heads, dim]: mean squared gradients.
    """
    shape = PageShape.of(model.config)
    rotary = Rotary.of(model)
    generator = torch.Generator().manual_seed(seed)
    states: list[list[Tensor]] = [[] for _ in range(2 * shape.layers)]
    costs = [torch.zeros(()) for _ in states]
    for window in ids:
        for index, (side, gradient) in enumerate(_gradients(model, window, generator)):
            if rotary is not None and index % 2 == 0:
                places = torch.arange(side.shape[1], device=side.device).expand(len(side), -1)
                side, gradient = (rotary.turn(s, places, back=True) for s in (side, gradient))
            states[index].append(side.to(torch.bfloat16))
            costs[index] = costs[index] + gradient.square().mean(1) / len(ids)
    return [(torch.cat(s, 1), c) for s, c in zip(states, costs, strict=True)]


def _gradients(
    model: Any, window: Tensor, generator: torch.Generator
) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [kv_heads, n, dim] of each layer in turn, and their gradients."""
    embedded = model.get_input_embeddings()(window[None].to(_device(model))).detach()
    with torch.enable_grad(), _seeing(model) as kept:
        logits = model(inputs_embeds=embedded.requires_grad_(), use_cache=False).logits[0]
        chances = logits.detach().float().softmax(-1).cpu()
        drawn = torch.multinomial(chances, 1, generator=generator).to(logits.device)
        loss = logits.float().log_softmax(-1).gather(1, drawn).sum()
        sides = [side for pair in kept for side in pair]
        gradients = torch.autograd.grad(loss, sides)
    if len(sides) != 2 * text_config(model.config).num_hidden_layers:
        raise PliantError(f"{type(model).__name__} did not show the keys of all its layers")
    return [(s[0].detach(), g[0]) for s, g in zip(sides, gradients, strict=True)]


def _device(model: Any) -> torch.device:
    device: torch.device = model.get_input_embeddings().weight.device
    return device


@contextmanager
def _seeing(model: Any) -> Iterator[list[tuple[Tensor, Tensor]]]:
    config = text_config(model.config)
    kept: list[tuple[Tensor, Tensor]] = []
    before, token = config._attn_implementation, _kept.set(kept)
    config._attn_implementation = _SEEN
    try:
        yield kept
    finally:
        config._attn_implementation = before
        _kept.reset(token)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    _kept.get().append((key, value))
    found = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=True
    )
    return found.transpose(1, 2), None


# No mask function goes with it, so that transformers makes no mask.
AttentionInterface.register(_SEEN, _attention)
