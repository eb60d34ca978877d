"""From checkpoint tensor names to module parameters, one parameter at a time.

transformers may rename, stack, split or fuse stored tensors while it loads them. Its rules are
applied here lazily, so that no more than the parameters asked for are ever in memory.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from pliant.errors import CheckpointError
from pliant.model.checkpoint import Checkpoint


@dataclass
class _Source:
    """The stored tensors that one parameter is made of, and the rule that makes it."""

    first: str  # the parameter's name by the rule's first target pattern
    converter: WeightConverter | None
    stored: list[tuple[str, str]] = field(default_factory=list)  # (source pattern, stored name)


class ParameterReader:
    """Reads parameters (and persistent buffers) of `model` from `checkpoint` by module path."""

    def __init__(self, checkpoint: Checkpoint, model: Any) -> None:
        self._checkpoint = checkpoint
        self._model = model
        self._wanted = model.state_dict()
        self._sources = self._resolve()
        self._tied = _tied(model)
        self._check_ties()
        missing = [name for name in self._wanted if self._find(name) is None]
        buffers = {name for name, _ in model.named_buffers()}
        missing = [name for name in missing if name not in buffers]
        if missing:
            raise CheckpointError(
                f"{checkpoint.source} lacks {len(missing)} tensors that "
                f"{type(model).__name__} needs, first {missing[0]!r}"
            )

    def __contains__(self, name: str) -> bool:
        return self._find(name) is not None

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """The parameter at `name` as the module stores it (or only some rows), checked shape."""
        found = self._find(name)
        if found is None:
            raise CheckpointError(f"{self._checkpoint.source} has no tensor for {name!r}")
        if found.converter is None:
            tensor = self._checkpoint.read(found.stored[0][1], rows)
        else:
            tensor = self._convert(found, found.stored)[name]
            if rows is not None:
                tensor = tensor[rows[0] : rows[1]]
        expected = tuple(self._wanted[name].shape)
        if rows is not None:
            expected = (rows[1] - rows[0], *expected[1:])
        if tuple(tensor.shape) != expected:
            raise CheckpointError(
                f"{name!r} in {self._checkpoint.source} has shape {list(tensor.shape)}, but "
                f"its configuration asks for {list(expected)}"
            )
        return tensor

    def read_expert(self, name: str, expert: int) -> Tensor:
        """One expert [a, b] of a stacked parameter, reading only that expert where it is stored."""
        found = self._find(name)
        if found is not None and found.converter is None:
            return self._checkpoint.read(found.stored[0][1], (expert, expert + 1))[0]
        if found is not None and _stacks_experts(found.converter):
            by_pattern: dict[str, list[tuple[str, str]]] = {}
            for item in found.stored:
                by_pattern.setdefault(item[0], []).append(item)
            one = [items[expert] for items in by_pattern.values()]
            return self._convert(found, one)[name][0]
        return self.read(name)[expert]

    def _check_ties(self) -> None:
        for name, group in self._tied.items():
            stored = {
                source.stored[0][1]
                for other in group
                if (source := self._sources.get(other)) is not None and source.converter is None
            }
            tensors = [self._checkpoint.read(one, (0, 1)) for one in sorted(stored)]
            if any(not torch.equal(tensors[0], other) for other in tensors[1:]):
                raise CheckpointError(
                    f"{self._checkpoint.source} ties {name!r} to other parameters, but holds "
                    f"different values for {' and '.join(sorted(stored))}; set "
                    "tie_word_embeddings to false in config.json"
                )

    def _find(self, name: str) -> _Source | None:
        for candidate in (name, *self._tied.get(name, ())):
            if candidate in self._sources:
                return self._sources[candidate]
        return None

    def _convert(self, source: _Source, stored: list[tuple[str, str]]) -> dict[str, Tensor]:
        converter = copy.deepcopy(source.converter)
        assert converter is not None
        for pattern, name in stored:
            converter.add_tensor(
                source.first, name, pattern, lambda name=name: self._checkpoint.read(name)
            )
        made = converter.convert(source.first, model=self._model, config=self._model.config)
        return {
            name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()
        }

    def _resolve(self) -> dict[str, _Source]:
        rules = get_model_conversion_mapping(self._model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        by_pattern = {
            pattern: converter for converter in converters for pattern in converter.source_patterns
        }
        prefix = self._model.base_model_prefix
        sources: dict[str, _Source] = {}
        for stored in sorted(self._checkpoint.names(), key=dot_natural_key):
            name, pattern = rename_source_key(stored, renamings, converters, prefix, self._wanted)
            if name not in self._wanted and stored in self._wanted:
                name, pattern = stored, None
            if name not in self._wanted:
                continue
            if pattern is None:
                sources.setdefault(name, _Source(name, None, [(stored, stored)]))
                continue
            converter = by_pattern[pattern]
            source = sources.get(name)
            if source is None:
                source = _Source(name, converter)
                for target in converter.target_patterns:
                    sources[name.replace(converter.target_patterns[0], target)] = source
            source.stored.append((pattern, stored))
        return sources


def _stacks_experts(converter: WeightConverter | None) -> bool:
    """Whether the rule stacks matrices on a new first dimension, each slice by itself."""
    return converter is not None and all(
        (isinstance(step, MergeModulelist) and step.dim == 0)
        or (isinstance(step, Concatenate) and step.dim > 0)
        for step in converter.operations
    )


def _tied(model: Any) -> dict[str, list[str]]:
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {name: group for group in groups.values() if len(group) > 1 for name in group}
