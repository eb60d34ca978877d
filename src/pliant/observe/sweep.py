"""One pass back through the model, layer by layer, that leaves each target's statistics.

Forward: every layer's input is kept on disk in 16 bits. Backward: one layer at a time is loaded,
run again from its input, and the gradient of the likelihood goes through it. So memory stays near
one layer's, whatever the depth, and a layer's statistics can be used and dropped at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from pliant.errors import PliantError
from pliant.model import StreamedModel, Target
from pliant.model.shards import read_bytes
from pliant.observe.statistics import Accumulator, Statistics

Progress = Callable[[int, int], None]
_PROBE_TOKENS = 1024
_PROBE_BYTES = 64 << 20
_TOKENS_AT_ONCE = {"cpu": 1024, "cuda": 4096}  # by type of device
_LOGITS_BYTES = 64 << 20
_JUDGE, _METHOD = "judge", "method"  # whom a sample of pairs is for


@dataclass
class Observation:
    """What one target met: its statistics, and pairs that predict what an error in it would do.

    inputs [n, in] and gradients [n, out] belong to the same n tokens, a sample of those that
    reached it; share: how many did of all (fewer for an expert). Gradients are scaled by the root
    of their sequence's weight. No token is also among the statistics' own pairs: what a method
    fits to those is judged on others.
    looked_up: for an embedding, token ids [T] with the gradients [T, in] at their rows.
    """

    target: Target
    statistics: Statistics
    inputs: Tensor | None = None
    gradients: Tensor | None = None
    looked_up: tuple[Tensor, Tensor] | None = None
    share: float = 1.0

    def damage(self, error: Tensor) -> Tensor:
        """Nats a token that `error` [out, in] in the weight adds, to second order; float64 [].

        Half the mean square of g . (error x): the Fisher information along the error, with
        tokens taken as independent. g comes from text that the model itself would say, so this
        is the curvature of the KL divergence, not of the loss on the calibration text.
        """
        total = torch.zeros((), dtype=torch.float64, device=error.device)
        if self.inputs is not None and self.gradients is not None and len(self.inputs):
            along = (self.inputs @ error.t()).mul_(self.gradients).sum(1)
            total += 0.5 * self.share * along.square().mean()
        if self.looked_up is not None:
            ids, gradients = self.looked_up
            start, stop = self.target.rows or (0, self.target.shape[0])
            inside = (ids >= start) & (ids < stop)
            along = (error[ids[inside] - start] * gradients[inside]).sum(1)
            total += 0.5 * along.square().sum() / max(len(ids), 1)
        return total


@dataclass
class _Watch:
    """Collects what `linear_calls` reports of one stretch of the model."""

    needs: Mapping[str, frozenset[str]]
    weighted: bool
    every: Mapping[str, int]
    tokens: int
    share: float = 1.0  # weight of the sequence that runs now
    accumulators: dict[str, Accumulator] = field(default_factory=dict)
    samples: dict[tuple[str, str], list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)

    def on_linear(self, target: Target, x: Tensor, y: Tensor) -> None:
        if not y.requires_grad:
            return
        kept_x, kept_y = x.detach().float(), y.detach()

        def on_gradient(gradient: Tensor) -> None:
            self._take(target, kept_x, kept_y, gradient.detach().float())

        y.register_hook(on_gradient)  # type: ignore[no-untyped-call]

    def _take(self, target: Target, x: Tensor, y: Tensor, g: Tensor) -> None:
        name = target.name
        if name not in self.accumulators:
            self.accumulators[name] = Accumulator(self.needs.get(name, frozenset()), self.weighted)
            self.seen[name] = 0
        self.accumulators[name].add(x, y, g, self.share)
        every, offsets = self.every.get(name, 1), {_JUDGE: 0}
        if "pairs" in self.needs.get(name, frozenset()):
            every = max(every, 2)
            offsets[_METHOD] = every // 2
        for who, offset in offsets.items():
            first = (offset - self.seen[name]) % every
            pair = x[first::every].clone(), g[first::every].clone()
            self.samples.setdefault((name, who), []).append(pair)
        self.seen[name] += len(x)

    def observation(self, target: Target) -> Observation:
        accumulator = self.accumulators.pop(target.name, None)
        if accumulator is None:
            return Observation(target, Statistics())
        statistics = accumulator.result()
        if (target.name, _METHOD) in self.samples:
            inputs, gradients = self._sample(target, _METHOD)
            statistics = replace(statistics, inputs=inputs, gradients=gradients)
        return Observation(
            target,
            statistics,
            *self._sample(target, _JUDGE),
            share=self.seen.pop(target.name) / self.tokens,
        )

    def _sample(self, target: Target, who: str) -> tuple[Tensor, Tensor]:
        inputs, gradients = zip(*self.samples.pop((target.name, who)), strict=True)
        return torch.cat(inputs), torch.cat(gradients)


class Sweep:
    """The pass over token ids [B, T]; `scratch` is a directory for layer inputs.

    needs: for each target's name, the fields of Statistics to keep ("pairs": both of a sample).
    weighted: second moments weigh tokens by their squared gradient. weights [B]: how much each
    sequence counts, positive, only their ratios matter. Everything random follows from `seed`.
    """

    def __init__(
        self,
        model: StreamedModel,
        ids: Tensor,
        scratch: Path,
        *,
        needs: Mapping[str, frozenset[str]],
        weighted: bool = True,
        seed: int = 0,
        weights: Tensor | None = None,
    ) -> None:
        self._model = model
        self._weights = None if weights is None else _normalised(weights, len(ids))
        self._ids = ids
        self._scratch = scratch
        self._needs = needs
        self._weighted = weighted
        self._seed = seed
        # Sequences that count differently run one by one.
        together = _TOKENS_AT_ONCE[model.device.type] // ids.shape[1]
        self._batch = 1 if weights is not None else max(1, together)
        tokens = ids.numel()
        rows = max(1, sum(t.shape[0] for t in model.targets if t.block is None))
        outer = min(_PROBE_TOKENS, max(64, _PROBE_BYTES // (4 * rows)))
        self._every = {
            t.name: max(1, tokens // (outer if t.block is None else _PROBE_TOKENS))
            for t in model.targets
        }

    @property
    def scratch_bytes(self) -> int:
        """What the layers' inputs take on disk."""
        width = int(self._model.config.get_text_config(decoder=True).hidden_size)
        return 2 * self._ids.numel() * width * (len(self._model.blocks) + 1)

    def forward(self, progress: Progress | None = None) -> Tensor:
        """Keep every layer's input; returns the last layer's output [B, T, H]."""
        scratch = self._scratch
        blocks = len(self._model.blocks)

        def sink(index: int, hidden: Tensor) -> None:
            _save(scratch / f"hidden-{index:05d}.bin", hidden)
            if progress is not None:
                progress(index, blocks)

        hidden = self._model.capture(self._ids, sink, batch=self._batch)
        _save(scratch / f"hidden-{blocks:05d}.bin", hidden)
        if progress is not None:
            progress(blocks, blocks)
        return hidden

    def forwarded(self) -> bool:
        """Whether every layer's input is on disk."""
        count = len(self._model.blocks)
        return all((self._scratch / f"hidden-{i:05d}.bin").exists() for i in range(count + 1))

    def outer(self) -> tuple[list[Observation], Tensor]:
        """Statistics of the head, and the gradient [B, T, H] at the last layer's output.

        The label of each position is drawn from the model's own prediction for it, so that the
        gradients' second moments are the Fisher information of the model, not of the text.
        """
        watch = self._watch()
        device = self._model.device
        generator = torch.Generator(device).manual_seed(self._seed)
        gradient = torch.empty(*self._ids.shape, self._width(), device=device)
        vocabulary = int(self._model.config.get_text_config(decoder=True).vocab_size)
        step = max(1, _LOGITS_BYTES // (4 * vocabulary))  # the backward pass holds several copies
        with self._model.linear_calls(watch.on_linear):
            for rows, hidden in self._hidden(len(self._model.blocks), batch=1):
                watch.share = self._weight(rows)
                for start in range(0, hidden.shape[1], step):
                    part = hidden[:, start : start + step].detach().requires_grad_(True)
                    logits = self._model.tail(part).flatten(0, 1).float()
                    chances = logits.detach().softmax(-1)
                    labels = torch.multinomial(chances, 1, generator=generator)[:, 0]
                    del chances
                    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
                    # Its root, on the way down from here, is in every gradient of the sequence.
                    (loss * watch.share**0.5).backward()  # type: ignore[no-untyped-call]
                    assert part.grad is not None
                    gradient[rows, start : start + step] = part.grad
                    del logits
        heads = [t for t in self._model.targets if t.block is None]
        return [watch.observation(t) for t in heads], gradient

    def block(
        self, index: int, gradient: Tensor, observe: bool = True
    ) -> tuple[list[Observation], Tensor]:
        """Statistics of layer `index`'s targets, and the gradient at its input.

        gradient: at its output [B, T, H]. `observe=False` only carries the gradient on.
        """
        watch = self._watch()
        below = torch.empty_like(gradient)
        with self._model.block(index) as module:
            for rows, hidden in self._hidden(index, self._batch):
                watch.share = self._weight(rows)
                hidden.requires_grad_(True)
                # Watched in either case: it rounds differently, and resuming changes no byte.
                with self._model.linear_calls(watch.on_linear if observe else _ignore):
                    output = self._model.run_block(module, index, hidden)
                output.backward(gradient[rows].to(output.dtype))  # type: ignore[no-untyped-call]
                assert hidden.grad is not None
                below[rows] = hidden.grad
        targets = [t for t in self._model.targets if t.block == index] if observe else []
        return [watch.observation(t) for t in targets], below

    def look_ups(self, observations: list[Observation], gradient: Tensor) -> None:
        """Add to the embeddings' observations the gradient [B, T, H] at the first layer's input."""
        ids, rows = self._ids.flatten(), gradient.flatten(0, 1)
        for seen in observations:
            if seen.target.kind == "embedding" and seen.target.shape[1] == rows.shape[1]:
                seen.looked_up = (ids.to(rows.device), rows)

    def forget(self) -> None:
        """Remove what the pass left in `scratch`."""
        for path in self._scratch.glob("hidden-*.bin"):
            path.unlink()

    def _watch(self) -> _Watch:
        return _Watch(self._needs, self._weighted, self._every, self._ids.numel())

    def _weight(self, rows: slice) -> float:
        return 1.0 if self._weights is None else self._weights[rows.start]

    def _width(self) -> int:
        size = (self._scratch / "hidden-00000.bin").stat().st_size
        return size // 2 // self._ids.numel()

    def _hidden(self, index: int, batch: int) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the batch with that layer's input [b, T, H] in the compute type."""
        path = self._scratch / f"hidden-{index:05d}.bin"
        count, length = self._ids.shape
        width = self._width()
        for start in range(0, count, batch):
            size = min(batch, count - start)
            row = 2 * length * width
            part = read_bytes(path, row * start, row * size).view(torch.bfloat16)
            part = part.view(size, length, width).to(self._model.device)  # widened there
            yield slice(start, start + size), part.to(self._model.dtype)


def _normalised(weights: Tensor, count: int) -> list[float]:
    """`weights` [count] with mean 1."""
    if weights.shape != (count,):
        raise PliantError(f"{count} sequences need {count} weights, not {tuple(weights.shape)}")
    values = weights.double()
    if not bool((torch.isfinite(values) & (values > 0)).all()):
        raise PliantError("the weights of sequences must be positive and finite")
    return [float(value) for value in values / values.mean()]


def _ignore(target: Target, x: Tensor, y: Tensor) -> None:
    pass


def _save(path: Path, hidden: Tensor) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        for row in hidden:
            file.write(
                row.detach().bfloat16().cpu().contiguous().view(torch.int16).numpy().tobytes()
            )
    temporary.replace(path)
