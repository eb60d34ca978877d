"""A transformers model whose matrices are held as codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pliant.codes import Code, RowStack
from pliant.errors import CorruptError, PliantError
from pliant.kernels import matmul
from pliant.model.architecture import empty_model
from pliant.model.attention import use_grouped_sdpa
from pliant.model.calls import tag
from pliant.model.stand_in import WeightStandIn
from pliant.model.target import Target, find_targets


class CodedWeight(WeightStandIn):
    """A module's weight held as one code, or as one code for each slice of its rows."""

    changes: ClassVar[int] = 0  # of all weights so far: what depends on codes need not look at each

    def __init__(self, parts: list[Code], dtype: torch.dtype, transposed: bool) -> None:
        rows = sum(part.shape[0] for part in parts)
        super().__init__((rows, parts[0].shape[1]), dtype, transposed)
        self._parts = parts
        self.code: Code = parts[0] if len(parts) == 1 else RowStack(tuple(parts))

    @property
    def device(self) -> torch.device:
        return self.code.device

    @property
    def nbytes(self) -> int:
        return self.code.nbytes

    def replace(self, part: int, code: Code) -> None:
        """Put `code` in the place of one part; what runs next uses it."""
        CodedWeight.changes += 1
        parts = [*self._parts[:part], code, *self._parts[part + 1 :]]
        self._parts, self.code = parts, code if len(parts) == 1 else RowStack(tuple(parts))

    def part(self, index: int) -> Code:
        return self._parts[index]

    def multiply(self, x: Tensor) -> Tensor:
        return matmul(x, self.code)

    def multiply_rows(self, x: Tensor, start: int, stop: int) -> Tensor:
        first = 0
        for part in self._parts:
            if first == start and part.shape[0] == stop - start:
                return matmul(x, part)
            first += part.shape[0]
        raise PliantError(f"rows {start}:{stop} are not one part of this weight")

    def gather(self, index: Tensor) -> Tensor:
        return self.code.rows(index, self.dtype)

    def dense(self) -> Tensor:
        return self.code.decode(self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CodedWeight:
        """Follow the module to another device; a code keeps its own dtypes."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        CodedWeight.changes += 1
        moved = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        self.dtype = moved.dtype
        if moved.device != self.device:
            self._parts = [part.to(moved.device) for part in self._parts]
            self.code = self._parts[0] if len(self._parts) == 1 else RowStack(tuple(self._parts))
        return self

    def extra_repr(self) -> str:
        return f"{self.canonical}, {self.code.bits:.2f} bits, {type(self.code).__name__}"


class CodedExperts(nn.Module):
    """A stacked parameter [experts, out, in] held as one code an expert."""

    def __init__(self, experts: list[CodedWeight]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)

    def __getitem__(self, index: int | Tensor) -> CodedWeight:
        expert = self.experts[int(index)]
        assert isinstance(expert, CodedWeight)
        return expert

    def __len__(self) -> int:
        return len(self.experts)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.experts), *self[0].shape))

    @property
    def dtype(self) -> torch.dtype:
        return self[0].dtype

    @property
    def device(self) -> torch.device:
        return self[0].device


def coded_model(
    source: str | Path | Any,
    codes: Mapping[str, Code],
    others: Mapping[str, Tensor],
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> Any:
    """The transformers model of a directory or configuration, its targets held as `codes`.

    codes: by target name (`find_targets`), each target once. others: every other parameter and
    persistent buffer by name. Nothing is ever dense that has a code.
    """
    config = source
    if isinstance(source, str | Path):
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    model = empty_model(config, trust_remote_code)
    use_grouped_sdpa(model)
    groups: dict[str, list[Target]] = {}
    for target in find_targets(model):
        groups.setdefault(target.parameter, []).append(target)
    places: dict[str, tuple[CodedWeight, int]] = {}
    for parameter, targets in groups.items():
        if parameter in others and not any(target.name in codes for target in targets):
            continue  # kept dense on purpose
        _install(model, parameter, targets, codes, dtype, places)
    _fill(model, others, dtype)
    model.coded_weights = places
    if isinstance(source, str | Path) and (Path(source) / "generation_config.json").is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(source)
    model.config.dtype = dtype
    return model


def swap(model: Any, target: Target | str, code: Code) -> None:
    """Replace the code of one target of a live coded model."""
    weight, part = coded_part(model, target)
    if code.shape != weight.part(part).shape:
        name = target if isinstance(target, str) else target.name
        raise CorruptError(
            f"a code of shape {code.shape} cannot replace {name} of shape {weight.part(part).shape}"
        )
    weight.replace(part, code if code.device == weight.device else code.to(weight.device))


def code_of(model: Any, target: Target | str) -> Code:
    """The code that a coded model holds for one target."""
    weight, part = coded_part(model, target)
    return weight.part(part)


def coded_part(model: Any, target: Target | str) -> tuple[CodedWeight, int]:
    """The weight that holds a target's code, and which of its parts that is."""
    name = target if isinstance(target, str) else target.name
    places: dict[str, tuple[CodedWeight, int]] = getattr(model, "coded_weights", {})
    if name not in places:
        raise PliantError(f"the model holds no code for a target called {name!r}")
    return places[name]


def _install(
    model: Any,
    parameter: str,
    targets: list[Target],
    codes: Mapping[str, Code],
    dtype: torch.dtype,
    places: dict[str, tuple[CodedWeight, int]],
) -> None:
    parts = []
    for target in targets:
        code = codes.get(target.name)
        if code is None:
            raise CorruptError(f"there is no code for target {target.name!r}")
        if tuple(code.shape) != target.shape:
            raise CorruptError(
                f"the code of {target.name!r} has shape {tuple(code.shape)}, not {target.shape}"
            )
        parts.append(code)
    transposed = targets[0].transposed
    holder: CodedWeight | CodedExperts
    if targets[0].expert is not None:
        weights = [CodedWeight([part], dtype, transposed) for part in parts]
        for target, weight in zip(targets, weights, strict=True):
            places[target.name] = (weight, 0)
            tag(weight, (target,))
        holder = CodedExperts(weights)
    else:
        holder = CodedWeight(parts, dtype, transposed)
        for index, target in enumerate(targets):
            places[target.name] = (holder, index)
        tag(holder, targets)
    for name in (parameter, *targets[0].tied):
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        del owner._parameters[leaf]
        setattr(owner, leaf, holder)


def _fill(model: Any, others: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    filled: dict[int, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if id(parameter) not in filled:
            if name not in others:
                continue
            tensor = others[name]
            if tensor.shape != parameter.shape:
                raise CorruptError(
                    f"{name!r} has shape {list(tensor.shape)}, not {list(parameter.shape)}"
                )
            filled[id(parameter)] = nn.Parameter(
                tensor.to(dtype) if tensor.is_floating_point() else tensor, requires_grad=False
            )
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._parameters[leaf] = filled[id(parameter)]
    for name, buffer in model.named_buffers():
        if name in others:
            buffer.copy_(others[name])
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if empty:
        raise CorruptError(f"there is no tensor for {empty[0]!r} ({len(empty)} are missing)")
