"""A checkpoint directory in Hugging Face's conventions, opened without reading its weights."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pliant.errors import CheckpointError, UnsupportedModelError
from pliant.model.shards import Entry, read_entry, read_header, sample_digest

_INDEX = "model.safetensors.index.json"
_CHECKED_AT_ONCE = 1 << 22


class Checkpoint:
    """Tensors by name, read one at a time; the configuration and tokenizer beside them.

    source: what the user named. directory: where the files are.
    """

    def __init__(
        self, directory: Path, source: str | None = None, trust_remote_code: bool = False
    ) -> None:
        self.directory = directory
        self.source = source or str(directory)
        self.trust_remote_code = trust_remote_code
        self.config: Any = _config(directory, trust_remote_code)
        self._entries = _entries(directory)
        self._finite: set[str] = set()

    def names(self) -> list[str]:
        """Names of the stored tensors, as the files spell them."""
        return list(self._entries)

    def entry(self, name: str) -> Entry:
        """Shape, dtype and place of one stored tensor."""
        if name not in self._entries:
            raise CheckpointError(f"{self.source} has no tensor {name!r}")
        return self._entries[name]

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """One tensor (or some of its rows) in its stored dtype; NaN or Inf is an error."""
        entry = self.entry(name)
        tensor = read_entry(entry, rows)
        if name not in self._finite and tensor.dtype.is_floating_point:
            if not _is_finite(tensor):
                raise CheckpointError(
                    f"tensor {name!r} in {entry.file} holds NaN or Inf values, so the model cannot "
                    "be compressed; the checkpoint is damaged or was saved from a diverged run"
                )
            if rows is None:
                self._finite.add(name)
        return tensor

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype in which most of the bytes are stored."""
        count: Counter[torch.dtype] = Counter()
        for entry in self._entries.values():
            if entry.dtype.is_floating_point:
                count[entry.dtype] += entry.nbytes
        return count.most_common(1)[0][0] if count else torch.float32

    @cached_property
    def nbytes(self) -> int:
        """Bytes that the original's parameters take in `dtype`, tied ones counted once."""
        from pliant.model.architecture import empty_model

        model = empty_model(self.config, trust_remote_code=self.trust_remote_code)
        count: int = sum(parameter.numel() for parameter in model.parameters())
        return count * self.dtype.itemsize

    def fingerprint(self) -> str:
        """sha256 of the configuration, tokenizer and sampled weights; the same for every copy."""
        digest = hashlib.sha256()
        for file in self._files():
            digest.update(file.name.encode())
            digest.update(sample_digest(file).encode())
        for name in sorted(self._entries):
            entry = self._entries[name]
            digest.update(f"{name} {entry.dtype} {entry.shape}".encode())
        return digest.hexdigest()

    def _files(self) -> Iterator[Path]:
        weights = {entry.file.name for entry in self._entries.values()}
        for file in sorted(self.directory.iterdir()):
            if file.name in weights or file.name in ("config.json", "tokenizer.json"):
                yield file

    def tokenizer(self) -> Any:
        """The transformers tokenizer stored beside the weights."""
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(
                self.directory, trust_remote_code=self.trust_remote_code
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise CheckpointError(
                f"{self.directory} holds no tokenizer that transformers can load ({error}); "
                "put tokenizer.json and tokenizer_config.json beside the weights"
            ) from error


def _is_finite(tensor: Tensor) -> bool:
    """One pass in most cases: a finite sum has finite terms."""
    for part in torch.split(tensor.reshape(-1), _CHECKED_AT_ONCE):  # the sum may widen a copy
        wide = part.float() if part.dtype.itemsize == 1 else part
        total = wide.sum(dtype=torch.float64 if wide.dtype == torch.float64 else torch.float32)
        if not bool(torch.isfinite(total)) and not bool(torch.isfinite(wide).all()):
            return False
    return True


def _config(directory: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    if not (directory / "config.json").is_file():
        raise CheckpointError(
            f"{directory} has no config.json; pass a Hugging Face model directory, a hub id, "
            "a .gguf file or smollm2"
        )
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UnsupportedModelError(
            f"transformers cannot read {directory / 'config.json'}: {reason}"
        ) from error
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        method = (
            quantization.get("quant_method", "unknown")
            if isinstance(quantization, dict)
            else getattr(quantization, "quant_method", "unknown")
        )
        raise UnsupportedModelError(
            f"{directory} is already quantized (quantization_config: {method}); "
            "start from the original checkpoint"
        )
    return config


def _entries(directory: Path) -> dict[str, Entry]:
    index = directory / _INDEX
    if index.is_file():
        try:
            weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{index} is not a safetensors index: {error}") from error
        files = [directory / name for name in sorted(set(weight_map.values()))]
    else:
        weight_map = {}
        single = directory / "model.safetensors"
        files = [single] if single.is_file() else sorted(directory.glob("*.safetensors"))
    if not files:
        pickles = sorted(directory.glob("*.bin")) + sorted(directory.glob("*.pt"))
        if pickles:
            raise CheckpointError(
                f"{directory} holds only pickled weights ({pickles[0].name}), which can run code "
                "when they are opened; convert them to safetensors first (load them with "
                "transformers where you trust them, then save_pretrained)"
            )
        raise CheckpointError(f"{directory} holds no .safetensors file")
    entries: dict[str, Entry] = {}
    for file in files:
        if not file.is_file():
            raise CheckpointError(
                f"shard {file.name} is missing from {directory}, though {_INDEX} names it"
            )
        entries.update(read_header(file))
    missing = sorted(set(weight_map) - set(entries))
    if missing:
        raise CheckpointError(
            f"tensor {missing[0]!r} is missing from shard {weight_map[missing[0]]} of {directory}, "
            f"though {_INDEX} places it there"
        )
    return entries
