"""Targets: the matrices of a model that may be compressed, found from module types."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pliant.errors import UnsupportedModelError
from pliant.model.architecture import find_blocks

SMALLEST_SIDE = 64
_SLICES = 8
_SLICE_ROWS = 4096
_ROW_MULTIPLE = 64


@dataclass(frozen=True)
class Target:
    """One matrix [out, in], or one expert or row slice of a parameter.

    name: unique and stable: the parameter's path, with "[3]" for expert 3, "[0:6144]" for rows.
    parameter: the parameter's path in the transformers module.
    kind: "linear", "expert", "embedding" or "head". A tied embedding and head are one "embedding".
    block: decoder layer index, None outside the layers.
    role: the last meaningful module name: "q_proj", "down_proj", "embed_tokens".
    shape: (out, in) in the canonical orientation, y = x W^T.
    transposed: the parameter is stored as [in, out].
    tied: other parameter paths that share this storage.
    """

    name: str
    parameter: str
    kind: str
    block: int | None
    role: str
    shape: tuple[int, int]
    transposed: bool = False
    expert: int | None = None
    rows: tuple[int, int] | None = None
    tied: tuple[str, ...] = ()

    def slice(self, stored: Tensor) -> Tensor:
        """This target's [out, in] view of its whole stored parameter."""
        if self.expert is not None:
            stored = stored[self.expert]
        if self.transposed:
            stored = stored.t()
        if self.rows is not None:
            stored = stored[self.rows[0] : self.rows[1]]
        return stored


def find_targets(model: Any) -> list[Target]:
    """Every target of a transformers model (which may be on meta), in the order of its modules."""
    blocks = {path: index for index, path in enumerate(find_blocks(model))}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = _tied_paths(model)
    targets: list[Target] = []
    seen: set[int] = set()
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{leaf}" if path else leaf
            kind = _kind(module, leaf, parameter, embedding, head)
            if kind is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            block = next((i for p, i in blocks.items() if path.startswith(p + ".")), None)
            role = leaf if kind == "expert" else path.rsplit(".", 1)[-1]
            others = tuple(other for other in tied[id(parameter)] if other != name)
            stored = tuple(parameter.shape[-2:])
            transposed = isinstance(module, Conv1D) or (
                kind == "expert" and bool(getattr(module, "is_transposed", False))
            )
            shape = (stored[1], stored[0]) if transposed else (stored[0], stored[1])
            if min(shape) < SMALLEST_SIDE:
                continue
            base = Target(name, name, kind, block, role, shape, transposed, tied=others)
            targets.extend(_split(base, parameter))
    _check_coverage(model, targets)
    return targets


def _kind(
    module: nn.Module, leaf: str, parameter: Tensor, embedding: nn.Module, head: nn.Module | None
) -> str | None:
    if leaf == "weight" and parameter.dim() == 2:
        if module is embedding:
            return "embedding"
        if module is head:
            return "head"
        if isinstance(module, nn.Linear | Conv1D):
            return "linear"
    if parameter.dim() == 3 and parameter.shape[0] == _expert_count(module):
        return "expert"
    return None


def _expert_count(module: nn.Module) -> int | None:
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        count = getattr(module, name, None)
        if isinstance(count, int):
            return count
    return None


def _tied_paths(model: Any) -> dict[int, list[str]]:
    paths: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        paths.setdefault(id(parameter), []).append(name)
    return paths


def _split(base: Target, parameter: Tensor) -> Iterator[Target]:
    if base.kind == "expert":
        for expert in range(parameter.shape[0]):
            yield _replace(base, f"{base.name}[{expert}]", base.shape, expert=expert)
        return
    slices = min(_SLICES, base.shape[0] // _SLICE_ROWS) if base.kind in ("embedding", "head") else 1
    if slices < 2:
        yield base
        return
    bounds = [
        base.shape[0] * index // slices // _ROW_MULTIPLE * _ROW_MULTIPLE for index in range(slices)
    ]
    for start, stop in zip(bounds, [*bounds[1:], base.shape[0]], strict=True):
        yield _replace(
            base, f"{base.name}[{start}:{stop}]", (stop - start, base.shape[1]), rows=(start, stop)
        )


def _replace(
    base: Target,
    name: str,
    shape: tuple[int, int],
    expert: int | None = None,
    rows: tuple[int, int] | None = None,
) -> Target:
    return Target(
        name, base.parameter, base.kind, base.block, base.role, shape, base.transposed,
        expert, rows, base.tied,
    )  # fmt: skip


def _check_coverage(model: Any, targets: list[Target]) -> None:
    """Refuse a model most of whose layers' weights sit in modules that were not recognised."""
    known = {target.parameter for target in targets}
    large = {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.dim() >= 2 and min(parameter.shape[-2:]) >= SMALLEST_SIDE
    }
    unknown = {name: size for name, size in large.items() if name not in known}
    if not targets or 2 * sum(unknown.values()) > sum(large.values()):
        name = max(unknown, key=lambda key: unknown[key]) if unknown else "none of at least 64 x 64"
        where = name.rsplit(".", 1)[0] if unknown else ""
        owner = f" in a {type(model.get_submodule(where)).__name__}" if unknown else ""
        raise UnsupportedModelError(
            f"cannot recognise most weights of {type(model).__name__} (largest: {name}{owner}); "
            "Pliant knows nn.Linear, Conv1D, embeddings and stacked expert parameters"
        )
