"""An answer, streamed: chunked prefill, a cache of fixed size, text as it comes."""

from __future__ import annotations

import inspect
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pliant.cache import DenseCache
from pliant.errors import PliantError
from pliant.plan.memory import PREFILL_CHUNK
from pliant.run.sampling import Sampler
from pliant.run.text import TextStream

DEFAULT_CONTEXT = 2048

Messages = Sequence[Mapping[str, str]]


@dataclass
class Usage:
    """Counts and times of one answer, filled while it is made.

    finish: "stop" (end of text or a stop string), "length" (max_new_tokens) or "context".
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    finish: str = ""

    @property
    def prefill_tps(self) -> float:
        return (self.prompt_tokens - self.cached_tokens) / max(self.prefill_seconds, 1e-9)

    @property
    def decode_tps(self) -> float:
        """Tokens a second after the first, which the prefill gives."""
        return max(self.new_tokens - 1, 0) / max(self.decode_seconds, 1e-9)


class Memory:
    """A cache and the tokens whose keys and values it holds, kept from one answer to the next."""

    def __init__(self, model: Any, context: int | None = None) -> None:
        self.context = min(context or context_of(model), context_of(model))
        config = model.config.get_text_config(decoder=True)
        self.cache = DenseCache(config, self.context)
        self.tokens: list[int] = []
        self.model = model
        self._logits_to_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._plan = getattr(model, "plan", None)
        self._step = getattr(model, "step", None)  # of a RunningModel
        self._logits = torch.empty(config.vocab_size)

    def common(self, tokens: Sequence[int], most: int | None = None) -> int:
        """How many tokens at the front of `tokens` are remembered; the rest is forgotten.

        At least the last of `tokens` is left to be computed, and no more than `most` are used.
        """
        if getattr(self.model, "plan", None) is not self._plan:  # resized: other weights
            self.forget()
        same = 0
        for ours, theirs in zip(self.tokens[:most], tokens[:-1], strict=False):
            if ours != theirs:
                break
            same += 1
        if same < len(self.tokens):
            if same and self.cache.is_croppable:
                self.cache.crop(same - len(self.tokens))
            else:
                same = 0
                self.cache.reset()
            self.tokens = self.tokens[:same]
        return same

    def forget(self) -> None:
        """Remember nothing; the storage stays."""
        self._plan, self.tokens = getattr(self.model, "plan", None), []
        self.cache.reset()

    @torch.inference_mode()
    def extend(self, tokens: Sequence[int], chunk: int = PREFILL_CHUNK) -> Tensor:
        """Run `tokens` through the model, `chunk` at a time; logits [vocabulary] after the last.

        They are the caller's until the next call.
        """
        device = self.model.get_input_embeddings().weight.device
        if len(tokens) == 1 and self._step:
            if self._logits.device != device:
                self._logits = self._logits.to(device)
            if self._step(tokens[0], self.cache, self._logits):
                self.tokens += tokens
                return self._logits
        logits = torch.empty(0)
        for piece in pieces(tokens, chunk):
            logits = self._forward(piece, 1)[-1]
        return logits

    @torch.inference_mode()
    def extend_all(self, tokens: Sequence[int]) -> Tensor:
        """Run `tokens` through the model at once; logits [tokens, vocabulary] after each."""
        return self._forward(tokens, 0)

    def _forward(self, tokens: Sequence[int], keep: int) -> Tensor:
        """Logits after the last `keep` tokens (0: all) at least, [some, vocabulary]."""
        device = self.model.get_input_embeddings().weight.device
        output = self.model(
            input_ids=torch.tensor([list(tokens)], device=device),
            past_key_values=self.cache,
            use_cache=True,
            **({"logits_to_keep": keep} if self._logits_to_keep else {}),
        )
        self.tokens += tokens
        logits: Tensor = output.logits[0]
        return logits


def stream(
    model: Any,
    tokenizer: Any,
    prompt: str | Messages | Sequence[int],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    top_h: float = 1.0,
    stop: Sequence[str] = (),
    raw: bool = False,
    memory: Memory | None = None,
    usage: Usage | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
) -> Iterator[str]:
    """Pieces of the answer to `prompt`, as they are made.

    prompt: text, chat messages ({"role", "content"}), or token ids. Text becomes a user's message
    where the tokenizer has a chat template, unless `raw`. memory: keeps what was computed for the
    next answer that begins the same. usage: filled with counts and times.
    """
    tokens = encode(tokenizer, prompt, raw)
    text = TextStream(tokenizer, stop)
    sampler = Sampler(temperature, top_p, seed, top_h=top_h)
    made = generate_tokens(
        model,
        tokens,
        sampler,
        max_new_tokens=max_new_tokens,
        end=end_tokens(model, tokenizer),
        memory=memory,
        usage=usage,
        prefill_chunk=prefill_chunk,
    )
    return _texts(made, text, usage)


def _texts(made: Iterator[int], text: TextStream, usage: Usage | None) -> Iterator[str]:
    for token in made:
        piece = text.push(token)
        if piece:
            yield piece
        if text.stopped:
            if usage is not None:
                usage.finish = "stop"
            return
    piece = text.finish()
    if piece:
        yield piece


def generate_tokens(
    model: Any,
    tokens: Sequence[int],
    sampler: Sampler,
    *,
    max_new_tokens: int = 256,
    end: frozenset[int] = frozenset(),
    memory: Memory | None = None,
    usage: Usage | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
) -> Iterator[int]:
    """Tokens that follow `tokens`, up to one of `end` (which is not given out)."""
    memory = memory or Memory(model)
    usage = usage if usage is not None else Usage()
    if not tokens:
        raise PliantError("the prompt is empty; give at least one token of text")
    if prefill_chunk < 1 or max_new_tokens < 1:
        raise PliantError("max_new_tokens and the prefill chunk must be at least 1")
    if len(tokens) > memory.context:
        raise PliantError(
            f"the prompt has {len(tokens)} tokens and the context is {memory.context}; shorten "
            "it, or open the model with a longer context"
        )
    return _generate(memory, list(tokens), sampler, max_new_tokens, end, usage, prefill_chunk)


def _generate(
    memory: Memory,
    tokens: list[int],
    sampler: Sampler,
    max_new_tokens: int,
    end: frozenset[int],
    usage: Usage,
    chunk: int,
) -> Iterator[int]:
    generator, said = sampler.generator(), Counter[int]()
    usage.prompt_tokens, usage.cached_tokens = len(tokens), memory.common(tokens)
    usage.new_tokens, usage.decode_seconds = 0, 0.0
    started = time.perf_counter()
    logits = memory.extend(tokens[usage.cached_tokens :], chunk)
    usage.prefill_seconds = time.perf_counter() - started
    while True:
        token = sampler.choose(logits, generator, said)
        said[token] += 1
        usage.new_tokens += 1
        if token in end:
            usage.finish = "stop"
            return
        yield token
        if usage.new_tokens >= max_new_tokens:
            usage.finish = "length"
            return
        if len(memory.tokens) >= memory.context:
            usage.finish = "context"
            return
        started = time.perf_counter()
        logits = memory.extend([token])
        usage.decode_seconds += time.perf_counter() - started


def pieces(tokens: Sequence[int], chunk: int) -> Iterator[Sequence[int]]:
    """`tokens` in pieces of at most `chunk`, none of them one token alone if that can be helped.

    One alone takes the path of decoding, which rounds otherwise: where a prompt is cut, or how much
    of it is remembered, should not show in the answer.
    """
    start = 0
    while start < len(tokens):
        left = len(tokens) - start
        size = chunk - 1 if left == chunk + 1 and chunk > 2 else chunk
        yield tokens[start : start + size]
        start += size


def encode(tokenizer: Any, prompt: str | Messages | Sequence[int], raw: bool = False) -> list[int]:
    """Token ids of text, chat messages or ids."""
    if not isinstance(prompt, str) and all(isinstance(part, int) for part in prompt):
        return [part for part in prompt if isinstance(part, int)]
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(prompt, str):
        if raw or not template:
            return list(tokenizer(prompt)["input_ids"])
        prompt = [{"role": "user", "content": prompt}]
    if not template:
        raise PliantError(
            "this model's tokenizer has no chat template; give plain text instead of messages"
        )
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer: the generation configuration's, the tokenizer's, <|im_end|>."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = set(configured if isinstance(configured, list) else [configured])
    found.add(getattr(tokenizer, "eos_token_id", None))
    for text in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>"):
        token = tokenizer.convert_tokens_to_ids(text)
        if token is not None and token != getattr(tokenizer, "unk_token_id", None):
            found.add(token)
    return frozenset(token for token in found if token is not None)


def context_of(model: Any) -> int:
    """Tokens that a sequence may have: as planned, else the configuration's, at most 2048."""
    plan = getattr(model, "plan", None)
    if plan is not None:
        return int(plan.context)
    config = model.config.get_text_config(decoder=True)
    return min(int(getattr(config, "max_position_embeddings", DEFAULT_CONTEXT)), DEFAULT_CONTEXT)
