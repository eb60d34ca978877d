"""GGUF files, converted once into a cached Hugging Face directory, tensor by tensor."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pliant.errors import CheckpointError, UnsupportedModelError

Progress = Callable[[str, int, int], None]  # what, done, of
_VERSION = 1
_SAMPLES = 1024
_SAMPLE_BYTES = 1 << 16
_CHUNK = 1 << 22  # weights dequantised at a time
_HEADER_ENTRY = 192  # bytes that a tensor's header entry takes at most, beside its name
_IGNORED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def convert_gguf(file: Path, cache: Path, progress: Progress | None = None) -> Path:
    """The directory under `cache` that holds `file` as fp16 safetensors, converting it if needed.

    Matrices become fp16 (bf16 where a value would overflow); vectors keep as many bits as they
    need. The directory appears under its name only when it is complete.
    """
    directory = cache / "gguf" / f"{file.stem}-{_content_key(file)}"
    if (directory / "config.json").is_file():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=directory.parent, prefix=".converting-"))
    try:
        _convert(file, scratch, progress or (lambda what, done, of: None))
        with suppress(OSError):  # another process may have finished the same conversion first
            scratch.chmod(0o755)
            scratch.rename(directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"could not write the converted model to {directory}")
    return directory


def _content_key(file: Path) -> str:
    """Digest of the size and of 64 MiB of samples: all of a small file, a tenth of a large one."""
    size = file.stat().st_size
    digest = hashlib.sha256(f"{_VERSION} {size}".encode())
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise CheckpointError(f"{file} is not a GGUF file: it does not start with 'GGUF'")
        for sample in range(_SAMPLES):
            stream.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
            digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def _convert(file: Path, directory: Path, progress: Progress) -> None:
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    from pliant.model.architecture import empty_model

    progress("reading the GGUF header", 0, 1)
    reader = _reader(file)
    try:
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    except (ValueError, KeyError, IndexError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UnsupportedModelError(f"transformers cannot read {file}: {reason}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:  # the tokenizers library raises nothing more precise
        reason = str(error).strip().split("\n")[0]
        raise UnsupportedModelError(
            f"transformers cannot convert the tokenizer of {file}: {reason}"
        ) from error
    config.__dict__.pop("quantization_config", None)
    model = empty_model(config)
    config.architectures = [type(model).__name__]
    config.dtype = torch.float16
    tokenizer.save_pretrained(directory)
    GenerationConfig.from_model_config(config).save_pretrained(directory)
    tensors = _tensors(file, reader, config, model, progress)
    _write_safetensors(directory / "model.safetensors", tensors, model)
    config.save_pretrained(directory)


def _reader(file: Path) -> Any:
    from gguf import GGUFReader

    try:
        return GGUFReader(str(file))
    except (ValueError, IndexError, KeyError, OverflowError, struct.error) as error:
        raise CheckpointError(
            f"{file} is damaged or truncated ({error}); download or copy it again"
        ) from error


def _tensors(
    file: Path, reader: Any, config: Any, model: Any, progress: Progress
) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every parameter, in the file's order."""
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
        read_field,
    )

    architecture = read_field(reader, "general.architecture")[0]
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
    names = get_gguf_hf_weights_map(_TwoLevels(model), processor)
    parts_left: dict[str, int] = {}
    for tensor in reader.tensors:
        if tensor.name in names:
            parts_left[names[tensor.name]] = parts_left.get(names[tensor.name], 0) + 1
    collected: dict[str, dict[str, Tensor]] = {"tensors": {}}
    written: set[str] = set()
    for index, tensor in enumerate(reader.tensors):
        progress("converting the GGUF file", index, len(reader.tensors))
        if tensor.name in _IGNORED:
            continue
        result = processor.process(
            weights=_dequantised(tensor),
            name=tensor.name,
            tensor_key_mapping={
                **names,
                **{name.removesuffix(".weight"): to for name, to in names.items()},
            },
            parsed_parameters=collected,
        )
        if result.name is None:  # a part of a stacked parameter, or stored under another name
            for name in list(collected["tensors"]):
                parts_left[name] = parts_left.get(name, 1) - 1
                if parts_left[name] <= 0:
                    yield name, collected["tensors"].pop(name)
                    written.add(name)
            continue
        if result.name not in names:
            raise UnsupportedModelError(
                f"{file}: transformers' {type(model).__name__} has no place for tensor "
                f"{tensor.name!r} of this {architecture} model"
            )
        yield names[result.name], torch.from_numpy(np.ascontiguousarray(result.weights))
        written.add(names[result.name])
    missing = [name for name, _ in model.named_parameters() if name not in written]
    if missing:
        raise CheckpointError(f"{file} lacks {len(missing)} tensors, first {missing[0]!r}")
    progress("converting the GGUF file", len(reader.tensors), len(reader.tensors))


class _TwoLevels:
    """A model down to its direct children: the name mapping looks no deeper to any use, slowly."""

    def __init__(self, module: Any, is_child: bool = False) -> None:
        self.config = getattr(module, "config", None)
        self.state_dict = module.state_dict
        self._children = [] if is_child else list(module.named_children())

    def named_children(self) -> list[tuple[str, _TwoLevels]]:
        return [(name, _TwoLevels(child, True)) for name, child in self._children]


def _dequantised(tensor: Any) -> np.ndarray:
    """The values of a GGUF tensor: fp16 (fp32 where that overflows), vectors in fp32."""
    from gguf import dequantize

    data = tensor.data
    if data.ndim < 2:
        return np.array(dequantize(data, tensor.tensor_type), dtype=np.float32)
    flat = data.reshape(-1, data.shape[-1])
    columns = int(tensor.shape[0])
    rows = max(1, _CHUNK // columns)
    out = np.empty((flat.shape[0], columns), dtype=np.float16)
    for start in range(0, flat.shape[0], rows):
        values = dequantize(flat[start : start + rows], tensor.tensor_type)
        if out.dtype == np.float16 and np.abs(values).max(initial=0) > np.finfo(np.float16).max:
            out = out.astype(np.float32)
        out[start : start + rows] = values
    return out.reshape(*(int(size) for size in reversed(tensor.shape)))


def _stored(tensor: Tensor) -> Tensor:
    """The tensor in the dtype that it is written in."""
    half = tensor.half()
    if tensor.dim() >= 2:
        fits = tensor.dtype == torch.float16 or bool(torch.isfinite(half).all())
        return half if fits else tensor.bfloat16()
    for narrow in (half, tensor.bfloat16()):
        if torch.equal(narrow.to(tensor.dtype), tensor):
            return narrow
    return tensor


def _write_safetensors(file: Path, tensors: Iterator[tuple[str, Tensor]], model: Any) -> None:
    """Write tensors as they come; the header goes last into room reserved at the front."""
    names = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
    room = 1024 + sum(len(name) + _HEADER_ENTRY for name in model.state_dict())
    room += -room % 8
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    with file.open("wb") as stream:
        stream.write(room.to_bytes(8, "little"))
        stream.seek(8 + room)
        for name, tensor in tensors:
            value = _stored(tensor).contiguous()
            stream.write(value.view(torch.uint8).numpy().data)
            header[name] = {
                "dtype": names[value.dtype],
                "shape": list(value.shape),
                "data_offsets": [offset, offset + value.nbytes],
            }
            offset += value.nbytes
        stream.seek(8)
        stream.write(json.dumps(header).encode().ljust(room))
