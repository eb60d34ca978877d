"""Tiny checkpoints with a tokenizer, and budgets that leave a wanted number of bytes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from pliant.budget import Budget
from pliant.fit import Recipe, default_recipe
from pliant.fit.recipe import Calibration, Rule, RungSpec, Search
from pliant.plan.memory import weights_budget
from tests.model.tiny import configurations, save

CONTEXT = 32
WORDS = [f"w{i}" for i in range(300)]


def checkpoint(
    directory: Path, family: str = "llama", dtype: str = "bfloat16", **sizes: Any
) -> Any:
    """A random model of `family` in `directory`, with a tokenizer of words."""
    config = configurations()[family]
    for name, value in sizes.items():
        setattr(config, name, value)
    model = save(config, directory).to(getattr(torch, dtype))
    model.save_pretrained(directory)
    words = Tokenizer(models.WordLevel({w: i + 3 for i, w in enumerate(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(
        directory
    )
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def text(path: Path, tokens: int = 400) -> Path:
    path.write_text(" ".join(WORDS[(i * i + 7 * i) % 300] for i in range(tokens)))
    return path


def recipe(measurements: int = 3, seed: int = 0, source: str | None = None) -> Recipe:
    """Three rungs a target from a few short sequences."""
    rungs = tuple(
        RungSpec(method="gptq", options={"bits": bits, "group_size": 32}) for bits in (2, 4, 8)
    )
    return default_recipe().model_copy(
        update={
            "seed": seed,
            "calibration": Calibration(sequences=4, length=24, text=source),
            "search": Search(measurements=measurements, sequences=1),
            "rules": (Rule(rungs=rungs),),
        }
    )


def memory(config: Any, weights: int) -> int:
    """The budget that leaves exactly `weights` bytes."""
    whole = 1 << 40
    return weights + whole - weights_budget(config, Budget(whole, CONTEXT, 1))


def sums(directory: Path) -> dict[str, str]:
    """sha256 of every file."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
