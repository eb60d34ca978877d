"""Opening checkpoints: what is read, and what is said about one that cannot be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from pliant.errors import CheckpointError, UnsupportedModelError
from pliant.model import StreamedModel, find_targets, open_checkpoint
from tests.model.tiny import configurations, save


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save(configurations()["llama"], tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save(configurations()["llama"], tmp_path / "sharded", max_shard_size="200KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    return tmp_path / "sharded"


def test_reads_what_safetensors_reads(directory: Path) -> None:
    checkpoint = open_checkpoint(directory)
    expected = load_file(directory / "model.safetensors")
    assert set(checkpoint.names()) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.read(name), tensor)
    name = "model.embed_tokens.weight"
    assert torch.equal(checkpoint.read(name, (16, 48)), expected[name][16:48])
    assert checkpoint.dtype == torch.float32
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in expected.values())


def test_tied_weights_count_once(tmp_path: Path) -> None:
    model = save(configurations()["llama_tied"], tmp_path)
    assert open_checkpoint(tmp_path).nbytes == 4 * sum(p.numel() for p in model.parameters())


def test_sharded_reads_the_same(directory: Path, sharded: Path) -> None:
    one, many = open_checkpoint(directory), open_checkpoint(sharded)
    assert set(one.names()) == set(many.names())
    assert all(torch.equal(one.read(name), many.read(name)) for name in one.names())


def test_fingerprint_is_stable_over_copies_and_notices_changes(sharded: Path) -> None:
    copied = Path(shutil.copytree(sharded, sharded.parent / "copy"))
    assert open_checkpoint(sharded).fingerprint() == open_checkpoint(copied).fingerprint()
    shard = sorted(copied.glob("*.safetensors"))[0]
    damaged = bytearray(shard.read_bytes())
    damaged[-1] ^= 1
    shard.write_bytes(damaged)
    assert open_checkpoint(sharded).fingerprint() != open_checkpoint(copied).fingerprint()


def test_reading_leaves_nothing_mapped(directory: Path) -> None:
    checkpoint = open_checkpoint(directory)
    kept = [checkpoint.read(name) for name in checkpoint.names()]
    assert kept
    assert "model.safetensors" not in Path("/proc/self/maps").read_text()


def refused(source: Any, *words: str, error: type[Exception] = CheckpointError) -> None:
    with pytest.raises(error) as caught:
        StreamedModel(open_checkpoint(source))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_nothing_there(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere", "hub id")
    refused(tmp_path, "config.json")
    refused(str(tmp_path / "model.gguf"), "model.gguf")


def test_missing_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    refused(sharded, shard.name, "missing")


def test_truncated_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    refused(sharded, shard.name, "truncated")


@pytest.mark.parametrize("length", [0, 5, 40])
def test_file_that_ends_in_its_header(directory: Path, length: int) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    refused(directory, "model.safetensors", "not a complete safetensors file")


def test_bad_header(directory: Path) -> None:
    file = directory / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[8:12] = b"\xff\x00[["
    file.write_bytes(data)
    refused(directory, "model.safetensors", "header")


@pytest.mark.parametrize("field", [{"dtype": "X9"}, {"shape": [7, 7]}, {"data_offsets": [0, 3]}])
def test_header_that_contradicts_itself(directory: Path, field: dict[str, Any]) -> None:
    file = directory / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["model.norm.weight"] |= field
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    refused(directory, "model.norm.weight")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_value_that_is_no_number(directory: Path, value: float) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 4] = value
    save_file(tensors, file, metadata={"format": "pt"})
    streamed = StreamedModel(open_checkpoint(directory))
    with pytest.raises(CheckpointError, match=r"up_proj.*NaN or Inf"), streamed.block(1):
        pass


def test_missing_tensor_and_wrong_shape(directory: Path) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    weight = tensors.pop(name)
    save_file(tensors, file, metadata={"format": "pt"})
    refused(directory, name, "lacks")
    save_file(tensors | {name: weight[:-1].contiguous()}, file, metadata={"format": "pt"})
    streamed = StreamedModel(open_checkpoint(directory))
    with pytest.raises(CheckpointError, match="shape"), streamed.block(1):
        pass


def test_tie_that_the_tensors_deny(tmp_path: Path) -> None:
    save(configurations()["llama"], tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    refused(tmp_path, "ties", "lm_head.weight", "tie_word_embeddings")


def test_pickles_are_refused(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    refused(directory, "pickle", "safetensors")
    refused(directory / "pytorch_model.bin", "pickle")
    (directory / "pytorch_model.bin").unlink()
    refused(directory, "no .safetensors file")


def test_unreadable_configuration(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"model_type": "martian"}))
    refused(directory, "martian", error=UnsupportedModelError)
    quantized = config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (directory / "config.json").write_text(json.dumps(quantized))
    refused(directory, "already quantized", "gptq", error=UnsupportedModelError)
    (directory / "config.json").write_text("{")
    refused(directory, "config.json", error=UnsupportedModelError)


def test_no_tokenizer(directory: Path) -> None:
    with pytest.raises(CheckpointError, match="tokenizer"):
        open_checkpoint(directory).tokenizer()


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> str:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    refused("someone/some-model", "someone/some-model", "hub cannot be reached", "directory")


def test_hub_download_is_opened(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    asked: list[Any] = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options["allow_patterns"]))
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    checkpoint = open_checkpoint("someone/some-model")
    assert checkpoint.source == "someone/some-model"
    assert asked[0][0] == "someone/some-model"
    assert not any("bin" in pattern for pattern in asked[0][1])


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (transformers.T5Config(d_model=64, num_layers=2), ["t5", "encoder-decoder"]),
        (transformers.ViTConfig(hidden_size=64, num_hidden_layers=2), ["vit", "causal"]),
        (
            transformers.MambaConfig(
                hidden_size=64, num_hidden_layers=2, vocab_size=320, state_size=4
            ),
            [],
        ),
    ],
)
def test_architectures_that_are_not_decoders(tmp_path: Path, config: Any, words: list[str]) -> None:
    if words:
        config.save_pretrained(tmp_path)
        save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
        refused(tmp_path, *words, error=UnsupportedModelError)
    else:  # state space models are decoders too, and what is a matrix in them is found
        model = save(config, tmp_path)
        assert {target.role for target in find_targets(model)} >= {"in_proj", "out_proj"}


def test_no_recognisable_layers(tmp_path: Path) -> None:
    model = save(configurations()["llama"], tmp_path)
    model.config.num_hidden_layers = 7
    with pytest.raises(UnsupportedModelError, match=r"decoder layers of LlamaForCausalLM"):
        find_targets(model)


def test_unknown_modules_are_named(tmp_path: Path) -> None:
    class Strange(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = torch.nn.Parameter(torch.zeros(1024, 1024))

    model = save(configurations()["llama"], tmp_path)
    model.model.strange = Strange()
    with pytest.raises(UnsupportedModelError, match=r"model\.strange\.kernel in a Strange"):
        find_targets(model)
