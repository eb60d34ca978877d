"""Training a whole ladder against the original: every size at once, one size a step.

Each step draws a size, takes the ladder's rungs for it, and moves their integers and scales along
the gradient of the KL divergence from the original's predictions. Rungs are shared by all sizes
that use them, so what is learned holds at every size between. Sources: LLM-QAT: Data-Free
Quantization Aware Training for Large Language Models (distillation on the model's own text);
Once-for-All: Train One Network and Specialize it for Efficient Deployment (sampled sizes).
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache

from pliant.codes import Code, Dense
from pliant.errors import PliantError
from pliant.fit.descent import descend, write_weights
from pliant.fit.recipe import Tune
from pliant.kernels.streams import aside
from pliant.ladder import Ladder
from pliant.ladder.output import told_when_full
from pliant.methods.latent import Latent, latent_of
from pliant.model import StreamedModel, coded_model

Progress = Callable[[int, int], None]
Load = Callable[[str, int], Code]
Key = tuple[str, int]  # target, rung

_LOG = logging.getLogger(__name__)
_SAVE_SECONDS = 300.0
_AGREEMENT = 0.05  # of a gradient in 16 bits, summed in another order
_STATE = ("position", "log_scale", "mean", "square", "scale_mean", "scale_square", "steps")


def tune(
    model: StreamedModel,
    ladder: Ladder,
    load: Load,
    ids: Tensor,
    settings: Tune,
    *,
    seed: int = 0,
    work: Path | None = None,
    progress: Progress | None = None,
) -> dict[Key, Code]:
    """The rungs that training changed, by target and index, each of as many bytes as before.

    model: the original, resident on its device. ids: text [n, T]. work: a directory where the
    state is kept every five minutes, and taken up again. PliantError when the text is shorter
    than a step's batch.
    """
    if len(ids) < settings.batch:
        raise PliantError(
            f"tuning takes {settings.batch} sequences a step; the text has {len(ids)}"
        )
    low, high = trained_sizes(ladder, settings)
    latents = _latents(model, ladder, load, low, high)
    student = _Student(model, ladder, load, latents)
    path = None if work is None else work / "tuning.safetensors"
    start = 0 if path is None or not path.exists() else _take_up(path, latents)
    saved = time.monotonic()
    hidden = _last_hidden(model, ids)
    ids = ids.to(hidden.device)
    sizes, rows = _plan(len(ids), settings, (low, high), seed)
    rows = rows.to(hidden.device)
    for step, size in islice(enumerate(sizes), start, None):
        student.go_to(size)
        parts = torch.split(rows[step], settings.at_once)
        for part in parts:
            share = len(part) / settings.batch
            student.run(ids[part], hidden[part], share, alone=len(parts) == 1)
        student.descend(settings, _schedule(step, settings.steps))
        if progress is not None:
            progress(step + 1, settings.steps)
        if path is not None and time.monotonic() - saved > _SAVE_SECONDS:
            _save(path, latents, step + 1)
            saved = time.monotonic()
    return {key: latent.encode().to("cpu") for key, latent in latents.items()}


def trained_sizes(ladder: Ladder, settings: Tune) -> tuple[int, int]:
    """The smallest and the largest size, in bytes of weights, that are trained.

    `settings.bits` are bits a weight of the targets that have a choice.
    """
    chosen = {target: rungs for target, rungs in ladder.rungs.items() if len(rungs) > 1}
    numbers = sum(math.prod(rungs[0].meta["shape"]) for rungs in chosen.values())
    rest = ladder.smallest_bytes - sum(rungs[0].nbytes for rungs in chosen.values())
    low, high = (rest + int(bits * numbers / 8) for bits in settings.bits)
    low = max(low, ladder.smallest_bytes)
    return low, max(low, min(high, ladder.largest_bytes))


class _Student:
    """The model at one size after another, its trained rungs as differentiable matrices.

    Every matrix has its place for good, so that on a GPU a pass forward and back is captured once
    as a CUDA graph and replayed for all sizes.
    """

    def __init__(
        self, model: StreamedModel, ladder: Ladder, load: Load, latents: dict[Key, Latent]
    ) -> None:
        self._model, self._ladder, self._load, self._latents = model, ladder, load, latents
        # 16 bits where the multiply is done in them.
        dtype = torch.bfloat16 if model.device.type == "cuda" else torch.float32
        self._leaves = {
            target.name: torch.zeros(
                target.shape, dtype=dtype, device=model.device, requires_grad=True
            )
            for target in model.targets
        }
        codes: dict[str, Code] = {name: Dense(leaf) for name, leaf in self._leaves.items()}
        self._module = coded_model(model.config, codes, dict(model.others())).to(model.device)
        self._held: dict[str, int] = {}
        self._trained: dict[str, Latent] = {}  # whose weights the matrices are
        self._graph: _Captured | None = None
        # A router's choices are not for a graph.
        self._captures = model.device.type == "cuda" and all(
            target.expert is None for target in model.targets
        )

    def go_to(self, size: int) -> None:
        """Hold the ladder's rungs for `size` bytes of weights."""
        self._trained = {}
        for name, index in self._ladder.allocation(size).items():
            latent, leaf = self._latents.get((name, index)), self._leaves[name]
            if self._graph is None:
                leaf.grad = None
            if latent is not None:
                self._held.pop(name, None)
                self._trained[name] = latent
            elif self._held.get(name) != index:
                self._held[name] = index
                code = self._load(name, index).to(self._model.device)
                leaf.data.copy_(code.decode(leaf.dtype))
        leaves = [self._leaves[name].data for name in self._trained]
        write_weights(list(self._trained.values()), leaves)

    def run(self, ids: Tensor, hidden: Tensor, share: float, *, alone: bool) -> None:
        """Add `share` of the gradient of the divergence on ids [b, T] to the matrices'.

        hidden: the original's last hidden states [b, T, H]. alone: no other part of the step's
        text is added, and all steps have this shape.
        """
        device = self._model.device
        ids, hidden = ids.to(device), hidden.to(device, self._model.dtype)
        # What follows each token by the original, [b, T, vocabulary]. The text's hidden states and
        # a head of 16 bits are exact in tf32.
        with torch.no_grad(), _multiplying("high"):
            original = self._model.tail(hidden).float()
        if alone and self._captures and self._graph is None:
            self._captures = False  # once: what cannot be captured runs as it is
            self._graph = _Captured.of(self._divergence, ids, original, self._leaves.values())
        if self._graph is not None:
            self._graph.replay(ids, original)
            return
        loss = self._divergence(ids, original)
        (loss * share).backward()  # type: ignore[no-untyped-call]

    def descend(self, settings: Tune, share: float) -> None:
        """Move the latents along the gradients of the module's matrices, at `share` of the rates.

        An expert that saw no token stays where it is.
        """
        gradients = {name: self._leaves[name].grad for name in self._trained}
        moved = {name: gradient for name, gradient in gradients.items() if gradient is not None}
        descend(
            [self._trained[name] for name in moved], list(moved.values()),
            lambda bits: share * settings.rate_of(bits), share * settings.scale_rate,
        )  # fmt: skip

    def _divergence(self, ids: Tensor, original: Tensor) -> Tensor:
        """Mean KL, nats a token, of the student from the logits `original` on ids [b, T]."""
        kind = self._model.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda", cache_enabled=False):
            logits = self._module(
                input_ids=ids, past_key_values=_PassThrough(), use_cache=False
            ).logits
        if kind == "cuda":
            from pliant.kernels.triton.divergence import mean_divergence

            return mean_divergence(logits, original)
        theirs = original.log_softmax(-1)
        own = logits.float().log_softmax(-1)
        return torch.nn.functional.kl_div(
            own.flatten(0, 1), theirs.flatten(0, 1), reduction="batchmean", log_target=True
        )


@contextmanager
def _multiplying(precision: str) -> Iterator[None]:
    """With products of 32 bits at that precision (`torch.set_float32_matmul_precision`)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class _PassThrough(DynamicCache):  # type: ignore[misc]
    """A cache that keeps nothing.

    Without one, transformers looks for packed sequences in the positions and waits for the GPU.
    """

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return key_states, value_states


class _Captured:
    """A pass forward and back as a CUDA graph: a thousand launches become one."""

    def __init__(self, ids: Tensor, original: Tensor, graph: torch.cuda.CUDAGraph) -> None:
        self._ids, self._original, self._graph = ids, original, graph

    @classmethod
    def of(
        cls,
        loss: Callable[[Tensor, Tensor], Tensor],
        ids: Tensor,
        original: Tensor,
        leaves: Iterable[Tensor],
    ) -> _Captured | None:
        """The graph of `loss(ids, original).backward()`; None for a model that has none.

        Each replay overwrites the leaves' gradients.
        """
        leaves = list(leaves)
        device = leaves[0].device
        ids, original = ids.clone(), original.clone()
        with aside(device):
            for _ in range(2):
                loss(ids, original).backward()  # type: ignore[no-untyped-call]
        for leaf in leaves:
            leaf.grad = None
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                loss(ids, original).backward()  # type: ignore[no-untyped-call]
        except RuntimeError as error:  # it chooses by values, or a kernel of it waits
            torch.cuda.synchronize(device)
            _LOG.info("training without a CUDA graph: %s", error)
            for leaf in leaves:
                leaf.grad = None
            return None
        found = cls(ids, original, graph)
        return found if found._agrees(loss, leaves) else None

    def _agrees(self, loss: Callable[[Tensor, Tensor], Tensor], leaves: Sequence[Tensor]) -> bool:
        """Whether a replay gives the gradients that the pass itself gives; a model may choose."""
        self._graph.replay()
        replayed = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        loss(self._ids, self._original).backward()  # type: ignore[no-untyped-call]
        for leaf, gradient in zip(leaves, replayed, strict=True):
            own, leaf.grad = leaf.grad, gradient
            if own is None or gradient is None:
                agree = own is gradient
            else:
                apart = torch.linalg.vector_norm(own.float() - gradient.float())
                agree = bool(apart <= _AGREEMENT * torch.linalg.vector_norm(own.float()))
            if not agree:
                _LOG.info("training without a CUDA graph: its gradients differ")
                for other in leaves:
                    other.grad = None
                return False
        return True

    def replay(self, ids: Tensor, original: Tensor) -> None:
        """Set the leaves' gradients for ids [b, T], of the shape that was captured."""
        self._ids.copy_(ids)
        self._original.copy_(original)
        self._graph.replay()


def _latents(
    model: StreamedModel, ladder: Ladder, load: Load, low: int, high: int
) -> dict[Key, Latent]:
    """A latent for each rung that can be trained and is held between both sizes."""
    first, last = ladder.allocation(low), ladder.allocation(high)
    found = {}
    for target in model.targets:
        weight = model.weight(target)
        for rung in ladder.rungs[target.name]:
            if first[target.name] <= rung.index <= last[target.name]:
                latent = latent_of(load(target.name, rung.index).to(model.device), weight)
                if latent is not None:
                    found[target.name, rung.index] = latent
    if not found:
        raise PliantError("no rung in the range of sizes has a form that can be trained")
    return found


def _last_hidden(model: StreamedModel, ids: Tensor) -> Tensor:
    """The original's last hidden states [n, T, H] in 16 bits.

    On the GPU where they take at most a quarter of what is free: a step that copies nothing from
    main memory is launched while the one before it still runs.
    """
    place = torch.device("cpu")
    if model.device.type == "cuda":
        width = int(model.config.get_text_config(decoder=True).hidden_size)
        nbytes = ids.numel() * width * 2
        if nbytes <= torch.cuda.mem_get_info(model.device)[0] // 4:
            place = model.device
    return torch.cat([model.capture(part).bfloat16().to(place) for part in torch.split(ids, 32)])


def _plan(
    count: int, settings: Tune, sizes: tuple[int, int], seed: int
) -> tuple[list[int], Tensor]:
    """Every step's size, and its sequences [steps, batch]; each epoch has an order of its own."""
    chooser = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    whole = count - count % settings.batch
    epochs = -(-settings.steps * settings.batch // whole)
    orders = [torch.randperm(count, generator=generator)[:whole] for _ in range(epochs)]
    rows = torch.cat(orders).view(-1, settings.batch)[: settings.steps]
    return [chooser.randint(*sizes) for _ in range(settings.steps)], rows


def _schedule(step: int, steps: int) -> float:
    """Share of the rate: up over the first twentieth, then down as a cosine."""
    rise = min(1.0, (step + 1) / max(1, steps // 20))
    return rise * 0.5 * (1 + math.cos(math.pi * step / steps))


def _save(path: Path, latents: dict[Key, Latent], step: int) -> None:
    """What training has changed so far; latents that took no step are as they began."""
    tensors = {"step": torch.tensor(step)}
    for index, latent in enumerate(latents.values()):
        if latent.steps:
            held = (latent.position, latent.log_scale, *latent.moments, torch.tensor(latent.steps))
            tensors |= {f"{index}.{name}": t.detach() for name, t in zip(_STATE, held, strict=True)}
    temporary = path.with_suffix(".tmp")
    with told_when_full(path.parent, sum(tensor.nbytes for tensor in tensors.values())):
        save_file(tensors, temporary)
        temporary.replace(path)


@torch.no_grad()
def _take_up(path: Path, latents: dict[Key, Latent]) -> int:
    """Put a saved state back; the number of steps that are done."""
    tensors = load_file(path)
    for index, latent in enumerate(latents.values()):
        held = [tensors.get(f"{index}.{name}") for name in _STATE]
        if held[-1] is not None:
            latent.begin_step()
            own = (latent.position, latent.log_scale, *latent.moments)
            for parameter, value in zip(own, held, strict=False):
                parameter.copy_(value)
            latent.steps = int(held[-1])
    return int(tensors["step"])
