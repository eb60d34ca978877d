"""A model whose decoder layers are on the meta device until they are needed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pliant.errors import UnsupportedModelError
from pliant.model.architecture import empty_model, find_blocks
from pliant.model.calls import LinearCalls, OnLinear, tag
from pliant.model.checkpoint import Checkpoint
from pliant.model.naming import ParameterReader
from pliant.model.stand_in import StoredWeight
from pliant.model.target import Target, find_targets

Substitute = Callable[[Target], Tensor | None]
Sink = Callable[[int, Tensor], None]
_TOKENS_AT_ONCE = 4096
_REMEMBERED_SHAPES = 4
_READERS = 8


class _Stop(Exception):
    """Ends a forward pass at a decoder layer: what follows is not wanted."""


class StreamedModel:
    """transformers' own module tree over a checkpoint, one decoder layer in memory at a time.

    Everything outside the layers is resident, the embedding and head in the checkpoint's dtype.
    With `resident`, layers stay once they were loaded (for models that fit in memory as they are).
    `device`: where layers are put and run.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype = torch.float32,
        resident: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.device = torch.device(device)
        self.resident = resident
        self.module: Any = empty_model(checkpoint.config, checkpoint.trust_remote_code)
        self.config: Any = self.module.config
        self.blocks = find_blocks(self.module)
        self.targets = find_targets(self.module)
        self._by_parameter: dict[str, list[Target]] = {}
        for target in self.targets:
            self._by_parameter.setdefault(target.parameter, []).append(target)
        self._reader = ParameterReader(checkpoint, self.module)
        self._substitute: Substitute | None = None
        self._open = [0] * len(self.blocks)
        self._meta: dict[str, nn.Parameter] = {}
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}  # on a GPU
        self._recorded: dict[tuple[int, int], list[tuple[Any, Any]]] = {}
        self._layers = [self.module.get_submodule(path) for path in self.blocks]
        self._forwards = [layer.forward for layer in self._layers]
        self._on_block: Callable[..., Any] = self._stream
        self._muted = False  # while tokens that are not the caller's run through the model
        self._arity: int | None = None  # of the tuple that a layer returns, 0 for a plain tensor
        for index, layer in enumerate(self._layers):
            layer.forward = self._patched(index)
        self._load_buffers()
        self._load_outer()

    # Weights

    def weight(self, target: Target) -> Tensor:
        """The original weight of `target`, canonical [out, in], float32, on the device; a copy."""
        held = self._held(target)
        if held is not None:
            return target.slice(held).to(torch.float32, copy=True).contiguous()
        if target.rows is not None:
            return self._reader.read(target.parameter, target.rows).to(self.device).float()
        if target.expert is not None:
            stored = self._reader.read_expert(target.parameter, target.expert)
        else:
            stored = self._reader.read(target.parameter)
        stored = stored.to(self.device)
        return (stored.t() if target.transposed else stored).float().contiguous()

    def _held(self, target: Target) -> Tensor | None:
        """Its whole parameter, where its layer is resident as it was, in 32 bits."""
        if target.block is None or self.dtype != torch.float32 or self._substitute is not None:
            return None
        parameter = self.module.get_parameter(target.parameter)
        return None if parameter.is_meta else parameter.detach()

    def others(self) -> Iterator[tuple[str, Tensor]]:
        """Name and stored tensor of everything that is no target: norms, biases, routers."""
        for name, _ in self.module.named_parameters():
            if name not in self._by_parameter:
                yield name, self._reader.read(name)
        for name, _ in _persistent_buffers(self.module):
            if name in self._reader:
                yield name, self._reader.read(name)

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Decoder layer `index` with its weights in memory; they are freed on exit."""
        layer = self._layers[index]
        if not self._open[index]:
            parameters = list(layer.named_parameters(self.blocks[index]))
            self._load([name for name, parameter in parameters if parameter.is_meta])
        self._open[index] += 1
        try:
            yield layer
        finally:
            self._open[index] -= 1
            if not self._open[index] and not self.resident:
                self._free(index)

    @contextmanager
    def substitute(self, weights: Substitute | None) -> Iterator[None]:
        """Inside, targets take the weight [out, in] that `weights(target)` gives, None: theirs."""
        before = self._substitute
        self._set_substitute(weights)
        try:
            yield
        finally:
            self._set_substitute(before)

    def _set_substitute(self, weights: Substitute | None) -> None:
        self._substitute = weights
        for index in range(len(self.blocks)):
            self._free(index)
        self._load_outer()

    def _load(self, names: Sequence[str]) -> None:
        """Put parameters in place; for a GPU, several are read and checked at once."""
        if self.device.type == "cpu" or self._substitute is not None:
            for name in names:  # one at a time: in 32 bits each takes twice its bytes
                self._place(name, self._parameter(name))
            return
        with ThreadPoolExecutor(min(_READERS, os.cpu_count() or 1)) as pool:
            for name, tensor in zip(names, pool.map(self._parameter, names), strict=True):
                self._place(name, tensor)

    def _parameter(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The stored form of a parameter, substitutes in place; in the compute dtype if none."""
        dtype = dtype or self.dtype
        stored: Tensor | None = None
        theirs = []
        for target in self._by_parameter.get(name, []):  # one decoded slice in memory at a time
            weight = self._substitute(target) if self._substitute else None
            if weight is None:
                theirs.append(target)
                continue
            if stored is None:
                stored = torch.empty(self._meta_of(name).shape, dtype=dtype, device=self.device)
            target.slice(stored).copy_(weight)
        if stored is None:
            return self._original(name, dtype)
        if theirs:
            original = self._reader.read(name)
            for target in theirs:
                target.slice(stored).copy_(target.slice(original))
        return stored

    def _original(self, name: str, dtype: torch.dtype) -> Tensor:
        """A parameter as it was; what every substitution needs again stays on a GPU."""
        kept = self._kept.get((name, dtype))
        if kept is None:
            kept = self._reader.read(name).to(self.device).to(dtype)  # widened where it goes
            layers = any(target.block is not None for target in self._by_parameter.get(name, ()))
            if self.resident and self.device.type == "cuda" and not layers:
                self._kept[name, dtype] = kept
        return kept

    def _meta_of(self, name: str) -> Tensor:
        return self._meta[name] if name in self._meta else self.module.get_parameter(name)

    def _place(self, name: str, tensor: Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        owner = self.module.get_submodule(path)
        self._meta.setdefault(name, owner._parameters[leaf])
        parameter = nn.Parameter(tensor, requires_grad=False)
        tag(parameter, self._by_parameter.get(name, ()))
        owner._parameters[leaf] = parameter

    def _free(self, index: int) -> None:
        layer = self._layers[index]
        for name, _ in list(layer.named_parameters(self.blocks[index])):
            if name in self._meta:
                path, _, leaf = name.rpartition(".")
                self.module.get_submodule(path)._parameters[leaf] = self._meta[name]

    def _load_buffers(self) -> None:
        for name, buffer in _persistent_buffers(self.module):
            if name in self._reader:
                buffer.copy_(self._reader.read(name))
        if self.device.type != "cpu":
            for name, buffer in list(self.module.named_buffers()):
                path, _, leaf = name.rpartition(".")
                self.module.get_submodule(path)._buffers[leaf] = buffer.to(self.device)

    def _load_outer(self) -> None:
        inside = tuple(path + "." for path in self.blocks)
        for names in self._shared_names():
            if names[0].startswith(inside):
                continue
            name = next((name for name in names if name in self._by_parameter), names[0])
            targets = self._by_parameter.get(name, [])
            if targets and targets[0].kind in ("embedding", "head"):
                self._place_outer(names, self._outer_stand_in(name, targets))
                continue
            self._place(name, self._parameter(name))
            placed = self.module.get_parameter(name)
            for other in names:
                path, _, leaf = other.rpartition(".")
                self.module.get_submodule(path)._parameters[leaf] = placed

    def _outer_stand_in(self, name: str, targets: list[Target]) -> StoredWeight:
        # Not widened: in 32 bits a large vocabulary would be the largest thing in memory.
        tensor = self._parameter(name, self.checkpoint.dtype)
        stand_in = StoredWeight(tensor, self.dtype)
        tag(stand_in, targets)
        return stand_in

    def _place_outer(self, names: list[str], stand_in: StoredWeight) -> None:
        for name in names:
            path, _, leaf = name.rpartition(".")
            owner = self.module.get_submodule(path)
            if leaf in owner._parameters:
                self._meta.setdefault(name, owner._parameters.pop(leaf))
            setattr(owner, leaf, stand_in)

    def _shared_names(self) -> list[list[str]]:
        if not hasattr(self, "_shared"):
            groups: dict[int, list[str]] = {}
            for name, parameter in self.module.named_parameters(remove_duplicate=False):
                groups.setdefault(id(parameter), []).append(name)
            self._shared = list(groups.values())
        return self._shared

    # Running

    def capture(
        self,
        input_ids: Tensor,
        sink: Sink | None = None,
        batch: int | None = None,
    ) -> Tensor:
        """Run tokens [B, T] through embedding and layers, layer by layer, without gradients.

        Before layer i runs, `sink(i, hidden)` sees its whole input [B, T, H], which the layer's
        output then overwrites. `batch` sequences run at once (by default about 4096 tokens).
        Returns the last layer's output, before the final norm.
        """
        batch = batch or max(1, _TOKENS_AT_ONCE // input_ids.shape[1])
        with torch.no_grad():
            hidden = torch.cat([self.embed(ids) for ids in torch.split(input_ids, batch)])
            for index in range(len(self.blocks)):
                if sink is not None:
                    sink(index, hidden)
                with self.block(index) as module:
                    for part in torch.split(hidden, batch):
                        part.copy_(self.run_block(module, index, part))
        return hidden

    def embed(self, input_ids: Tensor) -> Tensor:
        """What layer 0 receives [B, T, H] for tokens [B, T]."""
        seen: list[Tensor] = []

        def stop(index: int, hidden: Tensor, args: Any, kwargs: Any) -> Tensor:
            seen.append(hidden)
            raise _Stop

        self._run(stop, input_ids)
        return seen[0]

    def run_block(self, module: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """Layer `index` (materialised: inside `block(index)`) on hidden [b, T, H]."""
        args, kwargs = self._arguments(hidden.shape[0], hidden.shape[1])[index]
        return _first(self._forwards[index](hidden, *args, **kwargs))

    def tail(self, hidden: Tensor) -> Tensor:
        """Logits [b, T, V] of the last layer's output: final norm, head, soft caps and all."""

        heard = self._muted

        def inject(index: int, _: Tensor, args: Any, kwargs: Any) -> Any:
            output = self._as_output(hidden)
            self._muted = heard or index < len(self.blocks) - 1
            return output

        with self._mute():
            return self._run(inject, torch.zeros(hidden.shape[:2], dtype=torch.long))

    def logits(self, input_ids: Tensor, batch: int | None = None) -> Tensor:
        """Next-token logits [B, T, V], streamed, without gradients."""
        hidden = self.capture(input_ids, batch=batch)
        with torch.no_grad():
            return torch.cat([self.tail(part) for part in torch.split(hidden, 1)])

    def linear_calls(self, on_linear: OnLinear) -> LinearCalls:
        """Context in which `on_linear(target, x, y)` sees each multiply by a target's weight."""

        def heard(target: Target, x: Tensor, y: Tensor) -> Tensor | None:
            return None if self._muted else on_linear(target, x, y)

        return LinearCalls(heard)

    @contextmanager
    def _mute(self, muted: bool = True) -> Iterator[None]:
        before, self._muted = self._muted, muted
        try:
            yield
        finally:
            self._muted = before

    def _patched(self, index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if args:
                hidden, args = args[0], args[1:]
            else:
                hidden = kwargs.pop("hidden_states")
            return self._on_block(index, hidden, args, kwargs)

        return forward

    def _stream(self, index: int, hidden: Tensor, args: Any, kwargs: Any) -> Any:
        with self.block(index):
            return self._forwards[index](hidden, *args, **kwargs)

    def _as_output(self, hidden: Tensor) -> Any:
        """`hidden` in the form in which this architecture's layers return it."""
        if self._arity is None:

            def probe(index: int, hidden: Tensor, args: Any, kwargs: Any) -> Tensor:
                output = self._stream(index, hidden, args, kwargs)
                self._arity = len(output) if isinstance(output, tuple) else 0
                raise _Stop

            with torch.no_grad(), self._mute():
                self._run(probe, torch.zeros(1, 1, dtype=torch.long))
        return (hidden, *[None] * (self._arity - 1)) if self._arity else hidden

    def _run(self, on_block: Callable[..., Any], input_ids: Tensor) -> Tensor:
        """A forward pass in which `on_block` answers for every layer; logits, or empty if ended."""
        before, self._on_block = self._on_block, on_block
        try:
            ids = input_ids.to(self.device)
            logits: Tensor = self.module(input_ids=ids, use_cache=False).logits
            return logits
        except _Stop:
            return torch.empty(0)
        finally:
            self._on_block = before

    def _arguments(self, batch: int, length: int) -> list[tuple[Any, Any]]:
        """What the model passes to each layer beside the hidden state: masks, rotary embeddings."""
        if (batch, length) not in self._recorded:
            with torch.no_grad(), self._mute():
                first, second = self._record(batch, length, 0), self._record(batch, length, 1)
            if not _same(first, second):
                raise UnsupportedModelError(
                    f"{type(self.module).__name__} passes token-dependent inputs to its decoder "
                    "layers beside the hidden state, so they cannot be streamed one by one"
                )
            while len(self._recorded) >= _REMEMBERED_SHAPES:
                del self._recorded[next(iter(self._recorded))]
            self._recorded[batch, length] = first
        return self._recorded[batch, length]

    def _record(self, batch: int, length: int, token: int) -> list[tuple[Any, Any]]:
        recorded: list[tuple[Any, Any]] = []

        def note(index: int, hidden: Tensor, args: Any, kwargs: Any) -> Any:
            recorded.append((args, kwargs))
            if index == len(self.blocks) - 1:
                raise _Stop
            return self._as_output(hidden)

        self._run(note, torch.full((batch, length), token))
        return recorded


def open_streamed(source: str | Path, dtype: torch.dtype = torch.float32) -> StreamedModel:
    """`StreamedModel` over whatever `open_checkpoint` opens."""
    from pliant.model.sources import open_checkpoint

    return StreamedModel(open_checkpoint(source), dtype)


def _first(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(_same, left, right))
    return True


def _persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    stored = set(model.state_dict())
    for name, buffer in model.named_buffers():
        if name in stored:
            yield name, buffer
