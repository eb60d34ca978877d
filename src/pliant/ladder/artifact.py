"""An artifact on disk: opened without reading the rungs that are not used."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pliant.budget import Budget
from pliant.codes import Code, from_tensors
from pliant.errors import CorruptError, PliantError
from pliant.ladder.cache_record import CacheRecord, read_record
from pliant.ladder.document import FILE_NAME, Document, from_bytes
from pliant.ladder.output import recover
from pliant.ladder.rung import Ladder, Rung
from pliant.ladder.shard import (
    Extent,
    check_extent,
    check_header,
    check_size,
    check_whole,
    read_extent,
)

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Artifact:
    """An opened artifact. Nothing of its weights is in memory; `load_code` reads one rung."""

    directory: Path
    document: Document

    @classmethod
    def open(cls, directory: str | Path) -> Artifact:
        """Read and check ladder.json, every shard's size and every shard's header."""
        path = Path(directory)
        recover(path)
        if not path.is_dir():
            raise PliantError(f"there is no directory {path}; give an artifact that `fit` wrote")
        try:
            raw = (path / FILE_NAME).read_bytes()
        except OSError as error:
            raise PliantError(
                f"{path} is not a Pliant artifact: {FILE_NAME} cannot be read "
                f"({error.strerror}); give a directory that `fit` wrote"
            ) from None
        document = from_bytes(raw, path / FILE_NAME)
        for name, info in document.shards.items():
            check_size(path, name, info)
            check_header(path, name, info)
        return cls(path, document)

    @cached_property
    def ladder(self) -> Ladder:
        return self.document.ladder()

    @property
    def targets(self) -> list[dict[str, Any]]:
        """The fields of each target, as the writer was given them."""
        return self.document.targets

    @property
    def budget(self) -> Budget | None:
        """The budget that the artifact was fitted for."""
        return Budget(**self.document.budget) if self.document.budget else None

    @property
    def recipe(self) -> dict[str, Any]:
        return self.document.recipe

    @property
    def provenance(self) -> dict[str, Any]:
        return self.document.provenance

    def config(self) -> Any:
        """The transformers configuration."""
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(self.directory)
        except (OSError, ValueError) as error:
            raise CorruptError(
                f"{self.directory / 'config.json'} cannot be read ({error}); "
                "copy the artifact again, or fit it again"
            ) from None

    def tokenizer(self) -> Any:
        """The transformers tokenizer."""
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.directory)
        except (OSError, ValueError, KeyError) as error:
            raise PliantError(f"{self.directory} holds no usable tokenizer: {error}") from None

    def cache_record(self) -> CacheRecord | None:
        """What its KV cache costs in fewer bits; None where nobody measured it."""
        return read_record(self.directory)

    def rung(self, target: str, index: int) -> Rung:
        try:
            rungs = self.document.rungs[target]
        except KeyError:
            raise PliantError(f"{self.directory} has no target called {target!r}") from None
        if not 0 <= index < len(rungs):
            raise PliantError(f"{target} has rungs 0 to {len(rungs) - 1}, not {index}")
        return rungs[index]

    def load_code(self, target: str, index: int, device: torch.device = CPU) -> Code:
        """One rung's code, its bytes checked, on `device`; it alone holds its memory."""
        rung = self.rung(target, index)
        return from_tensors(rung.meta, read_extent(self.directory, rung.where)).to(device)

    def load_codes(
        self, allocation: Mapping[str, int], device: torch.device = CPU
    ) -> dict[str, Code]:
        """The codes of many targets, read and checked side by side, on `device`.

        Of a GPU's no more are in main memory than are read at once.
        """
        with ThreadPoolExecutor(load_threads(device)) as pool:
            load = partial(self.load_code, device=device)
            codes = pool.map(load, allocation.keys(), allocation.values())
            return dict(zip(allocation, codes, strict=True))

    def load_fixed(self) -> dict[str, Tensor]:
        """The tensors that every size holds, by parameter name."""
        return read_extent(self.directory, self.document.fixed)

    def check_rungs(self, allocation: Mapping[str, int]) -> None:
        """Raise CorruptError unless every rung of `allocation` can be read and is undamaged."""
        rungs = [self.rung(target, index) for target, index in allocation.items()]
        with ThreadPoolExecutor(load_threads(CPU)) as pool:
            for _ in pool.map(lambda rung: check_extent(self.directory, rung.where), rungs):
                pass

    def verify(self) -> None:
        """Read all that any size takes; CorruptError names the first shard that is damaged."""
        extents: dict[str, list[Extent]] = {self.document.fixed.shard: [self.document.fixed]}
        for rungs in self.document.rungs.values():
            for rung in rungs:
                extents.setdefault(rung.where.shard, []).append(rung.where)
        for name, info in self.document.shards.items():
            check_whole(self.directory, name, info, extents.get(name, ()))


def load_threads(device: torch.device) -> int:
    """Rungs that are read and checked at once: on a CPU each is in memory twice for a moment."""
    return min(4 if device.type == "cpu" else 16, os.cpu_count() or 1)
