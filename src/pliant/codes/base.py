"""The Code interface: a matrix in fewer bytes, and how a code comes back from disk."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from pliant.errors import CorruptError

TILE = 32_768  # elements of a CPU tile: fits in cache, and below torch's threading threshold

_FORMS: dict[str, type[Code]] = {}


class Code(ABC):
    """An immutable [out, in] matrix that takes exactly `nbytes` bytes."""

    name: ClassVar[str]

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out, in)."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Everything that is stored, flat; nested codes are prefixed ("inner.", "parts.0.")."""

    @abstractmethod
    def meta(self) -> dict[str, Any]:
        """JSON-able description that rebuilds the code from its tensors."""

    @abstractmethod
    def rows(self, index: slice | Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Decode only the rows of `index` (a slice, or integers [n] >= 0) into a new [n, in]."""

    @classmethod
    @abstractmethod
    def build(cls, stored: Stored) -> Code:
        """The code that `stored` describes; CorruptError when its parts do not fit."""

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The whole matrix, [out, in]."""
        return self.rows(slice(None), dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors, all of them and nothing else."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def bits(self) -> float:
        """Bits a weight, everything counted."""
        out, width = self.shape
        return self.nbytes * 8 / max(out * width, 1)

    @property
    def device(self) -> torch.device:
        return next((t.device for t in self.tensors().values()), torch.device("cpu"))

    def to(self, device: torch.device | str) -> Code:
        """The same code on another device; itself when it is there."""
        if self.device == torch.device(device):
            return self
        moved = {key: tensor.to(device) for key, tensor in self.tensors().items()}
        return from_tensors(self.meta(), moved)


C = TypeVar("C", bound=type[Code])
V = TypeVar("V")


def form(name: str) -> Callable[[C], C]:
    """Register a Code class under the name that its meta carries on disk."""

    def record(cls: C) -> C:
        cls.name = name
        _FORMS[name] = cls
        return cls

    return record


class Stored:
    """A code's meta and tensors as read from disk, with checked access to each."""

    def __init__(self, meta: Mapping[str, Any], tensors: Mapping[str, Tensor], prefix: str = ""):
        if not isinstance(meta, Mapping):
            raise CorruptError(f"code {prefix or 'meta'!r} must be a mapping, not {meta!r}")
        self._meta, self._tensors, self._prefix = meta, tensors, prefix

    def field(self, key: str) -> Any:
        if key not in self._meta:
            raise CorruptError(f"code {self._meta.get('code')!r} lacks the field {key!r}")
        return self._meta[key]

    def integer(self, key: str, low: int, high: int) -> int:
        value = self.field(key)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise CorruptError(f"{key} must be an integer in {low}..{high}, not {value!r}")
        return value

    def flag(self, key: str) -> bool:
        value = self.field(key)
        if not isinstance(value, bool):
            raise CorruptError(f"{key} must be true or false, not {value!r}")
        return value

    def choice(self, key: str, known: Mapping[str, V]) -> V:
        value = self.field(key)
        if not isinstance(value, str) or value not in known:
            raise CorruptError(f"{key} must be one of {', '.join(known)}, not {value!r}")
        return known[value]

    def shape(self) -> tuple[int, int]:
        value = self.field("shape")
        good = isinstance(value, (list, tuple)) and len(value) == 2
        if not good or not all(isinstance(v, int) and 0 <= v < 2**40 for v in value):
            raise CorruptError(f"shape must be two sizes, not {value!r}")
        return value[0], value[1]

    def tensor(self, key: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> Tensor:
        """The tensor `key`, which must have `shape` and one of `dtypes`."""
        name = self._prefix + key
        if name not in self._tensors:
            raise CorruptError(f"tensor {name!r} is missing")
        tensor = self._tensors[name]
        if tensor.dtype not in dtypes:
            raise CorruptError(f"tensor {name!r} is {tensor.dtype}, expected {dtypes}")
        if tuple(tensor.shape) != shape:
            raise CorruptError(f"tensor {name!r} is {tuple(tensor.shape)}, expected {shape}")
        return tensor

    def code(self, key: str) -> Code:
        """The nested code described by meta[key], its tensors prefixed "key."."""
        return _build(Stored(self.field(key), self._tensors, f"{self._prefix}{key}."))

    def codes(self, key: str) -> tuple[Code, ...]:
        metas = self.field(key)
        if not isinstance(metas, (list, tuple)) or not metas:
            raise CorruptError(f"{key} must be a list of codes, not {metas!r}")
        return tuple(
            _build(Stored(meta, self._tensors, f"{self._prefix}{key}.{i}."))
            for i, meta in enumerate(metas)
        )


def _build(stored: Stored) -> Code:
    name = stored.field("code")
    if not isinstance(name, str) or name not in _FORMS:
        raise CorruptError(f"no code is called {name!r}; known codes: {', '.join(sorted(_FORMS))}")
    return _FORMS[name].build(stored)


def from_tensors(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Code:
    """Rebuild a code exactly; CorruptError when a tensor is missing, extra, or does not fit."""
    code = _build(Stored(meta, tensors))
    extra = set(tensors) - set(code.tensors())
    if extra:
        raise CorruptError(f"tensors that the code {code.name!r} has no use for: {sorted(extra)}")
    return code


def prefixed(prefix: str, code: Code) -> dict[str, Tensor]:
    """A nested code's tensors under their flat names."""
    return {f"{prefix}.{key}": tensor for key, tensor in code.tensors().items()}


def row_count(index: slice | Tensor, out: int) -> int:
    """How many rows `index` takes from `out`."""
    if isinstance(index, slice):
        return len(range(*index.indices(out)))
    return int(index.numel())


@contextmanager
def one_thread() -> Iterator[None]:
    """Element-wise work on a tile is too short to share: threads would wait for each other."""
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def row_tiles(rows: int, width: int, device: torch.device, tile: int = TILE) -> Iterator[slice]:
    """Slices of rows of about `tile` elements each; one slice on an accelerator."""
    step = max(1, tile // max(width, 1)) if device.type == "cpu" else max(rows, 1)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
