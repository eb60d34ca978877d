"""Training a whole ladder against the original: every size at once, one size a step.

Each step draws a size, takes the ladder's rungs for it, and moves their integers and scales along
the gradient of the KL divergence from the original's predictions. Rungs are shared by all sizes
that use them, so what is learned holds at every size between. Sources: LLM-QAT: Data-Free
Quantization Aware Training for Large Language Models (distillation on the model's own text);
Once-for-All: Train One Network and Specialize it for Efficient Deployment (sampled sizes).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from pliant.codes import Code, Dense, GroupInt
from pliant.errors import PliantError
from pliant.fit.recipe import Tune
from pliant.ladder import Ladder
from pliant.methods.latent import LatentInt
from pliant.model import StreamedModel, coded_model, swap

Progress = Callable[[int, int], None]
Key = tuple[str, int]  # target, rung


def tune(
    model: StreamedModel,
    ladder: Ladder,
    load: Callable[[str, int], Code],
    ids: Tensor,
    settings: Tune,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    log: Callable[[int, float, float], None] | None = None,
) -> dict[Key, Code]:
    """The rungs that training changed, by target and index, each of as many bytes as before.

    model: the original, resident on its device. ids: text [n, T]. log: (step, bits, KL).
    """
    if len(ids) < settings.batch:
        raise PliantError(
            f"tuning takes {settings.batch} sequences a step; the text has {len(ids)}"
        )
    device = model.device
    targets = {target.name: target for target in model.targets}
    numbers = sum(t.shape[0] * t.shape[1] for t in model.targets)
    sizes = _sizes(ladder, settings, numbers)
    latents = _latents(model, ladder, load, sizes)
    student = coded_model(
        model.config,
        {name: Dense(torch.zeros(t.shape, dtype=torch.bfloat16)) for name, t in targets.items()},
        dict(model.others()),
    ).to(device)
    held: dict[str, int] = {}
    groups = [
        {"params": [latent.position for latent in latents.values()], "rate": settings.rate},
        {"params": [latent.log_scale for latent in latents.values()], "rate": settings.scale_rate},
    ]
    optimizer = torch.optim.Adam(groups, lr=0.0, betas=(0.9, 0.99), foreach=True)
    hidden = _teacher(model, ids)
    chooser = random.Random(seed)
    order = _batches(len(ids), settings.batch, seed)
    for step in range(settings.steps):
        warm = min(1.0, (step + 1) / max(1, settings.steps // 20))
        decay = 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * warm * decay
        size = chooser.randint(sizes[0], sizes[1])
        weights: list[Tensor] = []  # with the graph back to their latents
        leaves: list[Tensor] = []  # what the student holds, so that gradients add up over parts
        for name, index in ladder.allocation(size).items():
            if (name, index) in latents:
                held.pop(name, None)
                weights.append(latents[name, index].weight())
                leaves.append(weights[-1].detach().bfloat16().requires_grad_(True))
                swap(student, targets[name], Dense(leaves[-1]))
            elif held.get(name) != index:
                held[name] = index
                decoded = load(name, index).to(device).decode(torch.bfloat16)
                swap(student, targets[name], Dense(decoded))
        rows = next(order)
        total = 0.0
        optimizer.zero_grad(set_to_none=True)
        for part in torch.split(rows, settings.at_once):
            loss = _divergence(model, student, ids[part].to(device), hidden[part].to(device))
            loss = loss * (len(part) / len(rows))
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        pairs = [
            (w, leaf.grad) for w, leaf in zip(weights, leaves, strict=True) if leaf.grad is not None
        ]  # an expert may see no token
        torch.autograd.backward([w for w, _ in pairs], [g.float() for _, g in pairs])
        optimizer.step()
        if log is not None:
            log(step, 8 * size / numbers, total)
        if progress is not None:
            progress(step + 1, settings.steps)
    return {key: latent.encode().to("cpu") for key, latent in latents.items()}


def _sizes(ladder: Ladder, settings: Tune, numbers: int) -> tuple[int, int]:
    """The smallest and the largest size, in bytes of weights, that are trained."""
    low, high = (int(bits * numbers / 8) for bits in settings.bits)
    return max(low, ladder.smallest_bytes), max(
        min(high, ladder.largest_bytes), ladder.smallest_bytes
    )


def _latents(
    model: StreamedModel,
    ladder: Ladder,
    load: Callable[[str, int], Code],
    sizes: tuple[int, int],
) -> dict[Key, LatentInt]:
    """A latent for each group-integer rung that the climb holds between both sizes."""
    first, last = ladder.allocation(sizes[0]), ladder.allocation(sizes[1])
    found = {}
    for target in model.targets:
        weight = model.weight(target)
        for rung in ladder.rungs[target.name]:
            if first[target.name] <= rung.index <= last[target.name]:
                code = load(target.name, rung.index).to(model.device)
                if isinstance(code, GroupInt):
                    found[target.name, rung.index] = LatentInt(code, weight)
    return found


def _teacher(model: StreamedModel, ids: Tensor) -> Tensor:
    """The original's last hidden states [n, T, H] in 16 bits, in main memory."""
    parts = [model.capture(part).bfloat16().cpu() for part in torch.split(ids, 32)]
    return torch.cat(parts)


def _divergence(model: StreamedModel, student: object, ids: Tensor, hidden: Tensor) -> Tensor:
    """Mean KL, nats a token, of the student from the original on ids [b, T]."""
    with torch.no_grad():
        original = model.tail(hidden.to(model.dtype)).float().log_softmax(-1)
    with torch.autocast(ids.device.type, torch.bfloat16):
        logits = student(input_ids=ids, use_cache=False).logits  # type: ignore[operator]
    theirs = logits.float().log_softmax(-1)
    return torch.nn.functional.kl_div(
        theirs.flatten(0, 1), original.flatten(0, 1), reduction="batchmean", log_target=True
    )


def _batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Indices of sequences, `size` at a time, every epoch in another order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from (part for part in torch.split(order, size) if len(part) == size)


def retuned(
    load: Callable[[str, int], Code], tuned: Mapping[Key, Code]
) -> Callable[[str, int], Code]:
    """`load` with the tuned codes in the place of those that they came from."""
    return lambda target, index: tuned.get((target, index)) or load(target, index)
