"""Calibration text: written by the model itself, or cut from what the user gives."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from pliant.errors import PliantError
from pliant.model import StreamedModel
from pliant.observe.stepping import stepper

Progress = Callable[[int, int], None]


def write_text(
    model: StreamedModel,
    sequences: int,
    length: int,
    *,
    seed: int = 0,
    prompts: Tensor | None = None,
    temperature: float = 1.0,
    progress: Progress | None = None,
) -> Tensor:
    """Token ids [sequences, length] that the model samples from itself.

    prompts: ids [n, p] that the first n sequences begin with instead.

    Each sequence starts with the beginning-of-text token or, where the model has none, with one
    drawn at random (LLM-QAT: Data-Free Quantization Aware Training for Large Language Models).
    The model must be resident: every step reads every layer.
    """
    if not model.resident:
        raise PliantError(
            "the original does not fit into memory to write its own calibration text; "
            "pass a text file with --text"
        )
    device = model.device
    generator = torch.Generator(device).manual_seed(seed)
    vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
    first = torch.randint(vocabulary, (sequences, 1), generator=generator, device=device)
    start = model.config.get_text_config(decoder=True).bos_token_id
    if isinstance(start, int):
        first[:] = start
    ids = torch.empty(sequences, length, dtype=torch.long, device=device)
    if prompts is not None and prompts.shape[1]:
        first[: len(prompts), 0] = prompts[:, 0].to(device)
    ids[:, :1] = first
    follow = stepper(model, sequences, length)
    step = first
    with torch.no_grad():
        for position in range(1, length):
            logits = follow(step, position - 1)
            shares = (logits.float() / temperature).softmax(-1)
            step = torch.multinomial(shares, 1, generator=generator)
            if prompts is not None and position < prompts.shape[1]:
                step[: len(prompts), 0] = prompts[:, position].to(device)
            ids[:, position : position + 1] = step
            if progress is not None:
                progress(position + 1, length)
    return ids.cpu()


def choose_windows(windows: Tensor, count: int, *, seed: int = 0) -> Tensor:
    """`count` of the windows [n, length] (all when fewer), drawn without replacement, seeded."""
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return windows[order[:count]]


def digest(ids: Tensor) -> str:
    """A fingerprint of token ids, the same on every machine."""
    return hashlib.sha256(ids.to(torch.int64).contiguous().numpy().tobytes()).hexdigest()[:16]
