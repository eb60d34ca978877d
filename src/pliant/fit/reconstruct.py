"""Making a model's codes better window after window, each fed by the compressed layers before it.

Two streams of hidden states walk through the layers: the original's, and the one of the codes as
they are by then. A window of adjacent layers is given what the second brings and is to give what
the first has after it; windows overlap in all layers but one. So a layer is fitted with its
successors, and later layers make up for what earlier ones got wrong. Wide windows start from what
narrow ones found: alone they are harder to descend, and ended worse on small models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pliant.codes import Code
from pliant.errors import RecipeError
from pliant.methods import find
from pliant.methods.window import Weights, Window, decoded
from pliant.model import StreamedModel, Target

Progress = Callable[[int, int], None]
_TOKENS_AT_ONCE = 4096


def reconstruct(
    model: StreamedModel,
    ids: Tensor,
    codes: Mapping[str, Code],
    method: str = "cbq",
    options: Mapping[str, Any] | None = None,
    *,
    window: int = 2,
    progress: Progress | None = None,
) -> dict[str, Code]:
    """`codes` after `method` has gone over windows of 1, 2, .. `window` layers, by target name.

    ids [n, T]: calibration text. Targets without a code keep the original weight; codes outside
    the layers are used (an embedding's errors reach the first window) and returned as they are.
    Results lie on the device that the code came from. Holds `window` layers and three copies of
    the hidden states [n, T, H]. RecipeError for a method of another kind or an unknown option.
    """
    info = find(method)
    if info.kind != "reconstruct":
        raise RecipeError(f"{method} is a method to {info.kind}; reconstruct takes cbq or its kind")
    options = dict(options or {})
    unknown = sorted(set(options) - set(info.options))
    if unknown:
        raise RecipeError(
            f"{method} has no option {unknown[0]!r}; it has {', '.join(info.options)}"
        )
    if window < 1:
        raise RecipeError(f"a window has at least 1 layer, not {window}")
    found = dict(codes)
    blocks = len(model.blocks)
    spans = range(1, min(window, blocks) + 1)
    done, total = 0, sum(blocks - span + 1 for span in spans)
    for span in spans:
        for better in _walk(model, ids, found, partial(info.function, **options), span):
            found |= {name: code.to(codes[name].device) for name, code in better.items()}
            done += 1
            if progress is not None:
                progress(done, total)
    return found


def _walk(
    model: StreamedModel,
    ids: Tensor,
    codes: Mapping[str, Code],
    method: Callable[[Window, dict[str, Code]], dict[str, Code]],
    span: int,
) -> Iterator[dict[str, Code]]:
    """What `method` makes of each window's codes; the caller updates `codes` before the next."""
    blocks = len(model.blocks)
    original = _embed(model, ids, {})
    compressed = _embed(model, ids, codes)
    for index in range(span):
        original = _advance(model, index, original, {})
    for start in range(blocks - span + 1):
        layers = range(start, start + span)
        own = [t for t in model.targets if t.block in layers and t.name in codes]
        with ExitStack() as stack:
            modules = {index: stack.enter_context(model.block(index)) for index in layers}
            weights = {target.name: model.weight(target) for target in own}
            run = _runner(model, modules)
            window = Window(weights, run, compressed, original, model.device)
            better = method(window, {t.name: codes[t.name] for t in own})
        yield better
        compressed = _advance(model, start, compressed, codes)
        if start + span < blocks:
            original = _advance(model, start + span, original, {})


def _runner(
    model: StreamedModel, modules: Mapping[int, nn.Module]
) -> Callable[[Weights, Tensor], Tensor]:
    def run(weights: Weights, hidden: Tensor) -> Tensor:
        hidden = hidden.to(model.dtype)
        for index, module in modules.items():
            with _placed(model, index, module, weights):
                hidden = model.run_block(module, index, hidden)
        return hidden

    return run


@contextmanager
def _placed(
    model: StreamedModel, index: int, module: nn.Module, weights: Weights
) -> Iterator[None]:
    """Inside, the layer's parameters are `weights`, in the graph that made them."""
    given: dict[str, list[Target]] = {}
    for target in model.targets:
        if target.block == index and target.name in weights:
            given.setdefault(target.parameter, []).append(target)
    kept: list[tuple[nn.Module, str, nn.Parameter | None]] = []
    try:
        for parameter, targets in given.items():
            path, _, leaf = parameter[len(model.blocks[index]) + 1 :].rpartition(".")
            owner = module.get_submodule(path)
            own = owner._parameters[leaf]
            assert own is not None
            kept.append((owner, leaf, own))
            stored = _stored(own, targets, weights)
            owner._parameters[leaf] = stored.to(model.dtype)  # type: ignore[assignment]
        yield
    finally:
        for owner, leaf, own in kept:
            owner._parameters[leaf] = own


def _stored(own: Tensor, targets: list[Target], weights: Weights) -> Tensor:
    """A parameter in its stored form, made of its targets' weights [out, in]."""
    parts = [
        weights[target.name].t() if target.transposed else weights[target.name]
        for target in targets
    ]
    if targets[0].expert is None:
        return parts[0]
    experts = list(own.unbind())
    for target, part in zip(targets, parts, strict=True):
        assert target.expert is not None
        experts[target.expert] = part.to(own.dtype)
    return torch.stack(experts)


@torch.no_grad()
def _embed(model: StreamedModel, ids: Tensor, codes: Mapping[str, Code]) -> Tensor:
    """What the first layer receives [n, T, H] in main memory, the embedding from its codes."""
    outer = {t.name for t in model.targets if t.block is None} & set(codes)

    def weight(target: Target) -> Tensor | None:
        return codes[target.name].to(model.device).decode() if target.name in outer else None

    with model.substitute(weight) if outer else ExitStack():
        return torch.cat([model.embed(part).cpu() for part in torch.split(ids, _batch(ids))])


@torch.no_grad()
def _advance(model: StreamedModel, index: int, hidden: Tensor, codes: Mapping[str, Code]) -> Tensor:
    """Hidden states [n, T, H] after layer `index`, its targets from `codes`, in main memory."""
    own = {t.name: codes[t.name] for t in model.targets if t.block == index and t.name in codes}
    with model.block(index) as module:
        run, weights = _runner(model, {index: module}), decoded(own, model.device)
        parts = torch.split(hidden, _batch(hidden))
        return torch.cat([run(weights, part.to(model.device)).cpu() for part in parts])


def _batch(rows: Tensor) -> int:
    return max(1, _TOKENS_AT_ONCE // rows.shape[1])
