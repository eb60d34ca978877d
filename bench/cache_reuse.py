"""The rows of bench/cache.py for text that is put together from chunks, and for edited text.

The text at the end is always the window's own, so that every row is compared with full attention
over the same tokens. An edit comes to it from a text that differs in SPAN tokens: where tokens are
deleted or replaced, the old ones are another window's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cache_protocol import PROMPT, Score, scored
from pliant.cache.limited import LimitedModel
from pliant.cache.policies.keep import Keep
from pliant.cache.reuse import Passage, assembled, edited, fill, read

SPAN, AT = 32, 700


def measure_reuse(
    model: Any, ids: Tensor, hidden: Tensor, rows: dict[str, Any], save: Callable[[], None]
) -> None:
    """Fill `rows`, window by window."""
    for index, window in enumerate(ids):
        other = ids[(index + 1) % len(ids)][AT : AT + SPAN]
        if all(str(index) in row["windows"] for row in rows.values()) and rows:
            continue
        for what, how, passage, computed in made(model, window[:PROMPT], other):
            row = rows.setdefault(f"{what}|{how}", {"what": what, "how": how, "windows": {}})
            limited = LimitedModel(model, Keep)
            fill(limited, passage)
            score = Score(model.lm_head, hidden[index])
            for tokens in scored(window):
                score.add(limited(tokens))
            found = score.result() | {"computed": computed / PROMPT}
            row["windows"][str(index)] = found
            print(f"window {index} {what}, {how}: KL {found['kl']:.4f}", flush=True)
            save()


def made(model: Any, prompt: Tensor, other: Tensor) -> Iterator[tuple[str, str, Passage, int]]:
    """(what, how, the prompt's passage, tokens computed)."""
    for chunk in (512, 128):
        parts = [read(model, part) for part in prompt.split(chunk)]
        what = f"{len(parts)} chunks of {chunk}, each computed alone"
        yield what, "keys turned to their places", assembled(model, parts), 0
        yield what, "keys left at 0", unturned(parts), 0
    first, last = prompt[:AT], prompt[AT + SPAN :]
    olds = {
        "inserted": (torch.cat([first, last]), AT, prompt[AT : AT + SPAN]),
        "replaced": (torch.cat([first, other, last]), AT + SPAN, prompt[AT : AT + SPAN]),
        "deleted": (torch.cat([prompt[:AT], other, prompt[AT:]]), AT + SPAN, prompt[:0]),
    }
    for name, (old, stop, new) in olds.items():
        known, what = read(model, old), f"{SPAN} tokens {name} at {AT}"
        found = edited(model, known, AT, stop, new)
        yield what, "the span computed, what follows turned", found, len(new)
        if name == "replaced":
            yield what, "the old text kept", known, 0
        else:
            parts = [found.part(0, AT + len(new)), known.part(stop, len(known))]
            yield what, "the span computed, what follows left", unturned(parts), len(new)


def unturned(parts: list[Passage]) -> Passage:
    """`parts` one behind another with keys as they are."""
    whole = torch.cat([part.tokens for part in parts])
    layers = []
    for own in zip(*(part.layers for part in parts), strict=True):
        keys, values = (torch.cat([getattr(e, n) for e in own], 1) for n in ("keys", "values"))
        positions = torch.arange(len(whole)).expand(len(keys), -1)
        layers.append(replace(own[0], keys=keys, values=values, positions=positions))
    return Passage(whole, tuple(layers))
