"""Opening an artifact as a model that generates inside its plan."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from pliant.cache import DenseCache
from pliant.codes.base import one_thread
from pliant.kernels import gpu
from pliant.kernels.activations import rounding_is_on
from pliant.kernels.cpu import integer_activations, multiplies_words
from pliant.kernels.cpu.structs import Unsuited
from pliant.ladder import LiveModel
from pliant.ladder import load as open_model
from pliant.ladder.live import Plan
from pliant.model.coded import CodedWeight
from pliant.model.heap import release
from pliant.plan.memory import PREFILL_CHUNK
from pliant.run.step import NativeStep

if TYPE_CHECKING:
    from pliant.run.gpu_step import GraphStep


class RunningModel(LiveModel):
    """A live model whose `generate` uses a cache of the planned size and prefills in chunks.

    Single tokens go through a step of their own where it knows the model and its codes: the native
    one on a CPU, a CUDA graph on a GPU (with PLIANT_GPU_KERNELS=1).
    """

    _step: NativeStep | None = None
    _step_of: Plan | None = None  # the plan that `_step` (or its absence) is of
    _graph: Any = None  # a GraphStep; transformers evaluates annotations, and Triton may be absent
    _graph_of: tuple[Plan, int] | None = None  # the plan and changes that `_graph` is of

    def new_cache(self) -> DenseCache:
        """An empty cache of the planned context and batch."""
        config: Any = self.config  # type: ignore[attr-defined]
        return DenseCache(config, self.plan.context, self.plan.batch)

    def step(self, token: int, cache: Any, logits: Tensor) -> bool:
        """One more token of the sequence in `cache`, natively; `logits` [vocabulary] is written.

        logits: float32, where the model is. False, and nothing done, where only the forward of
        transformers can do it.
        """
        if logits.is_cuda:
            graph = self.graph_step()
            return graph is not None and graph.run(token, cache, logits)
        native = self.native_step()
        return native is not None and native.run(token, cache, logits)

    def prompt(self, tokens: Tensor, cache: Any, last: int) -> Tensor | None:
        """`tokens` [n] behind those in `cache`, natively; logits [last, vocabulary].

        None, and nothing done, where only the forward of transformers can do it, or is faster.
        """
        native = self.native_step()
        if native is None or not multiplies_words():
            return None
        config: Any = self.config  # type: ignore[attr-defined]
        if last == 1:
            logits = torch.empty(config.vocab_size)
            return logits[None] if native.prompt(tokens, cache, logits) else None
        states = torch.empty(last, config.hidden_size)
        if not native.prompt(tokens, cache, states):
            return None
        return self.lm_head(states)  # type: ignore[attr-defined,no-any-return]

    def native_step(self) -> NativeStep | None:
        """The description of this model as it is now, for the native kernels."""
        if rounding_is_on():
            return None
        if self._step_of is not self.plan or (self._step and not self._step.current()):
            self._step, self._step_of = None, self.plan
            with suppress(Unsuited):
                self._step = NativeStep(self)
        return None if self._step is None or self._step.hooked() else self._step

    def graph_step(self) -> GraphStep | None:
        """The step on a GPU, for what the model holds now; None where there is none."""
        if not gpu.wanted() or rounding_is_on():
            return None
        made_of = (self.plan, CodedWeight.changes)
        if self._graph_of != made_of if self._graph is None else self._graph.outdated():
            from pliant.run.gpu_step import GraphStep

            self._graph, self._graph_of = None, made_of
            with suppress(Unsuited):
                self._graph = GraphStep(self)
        made: GraphStep | None = self._graph
        return made

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, fit for its size.

        Prompts and single tokens run natively where they can. A single token that cannot runs in
        one thread, whose pieces of work are too short to share. After more than one, what they
        freed goes back to the system.
        """
        ids = kwargs.get("input_ids", args[0] if args else None)
        cache = kwargs.get("past_key_values")
        if ids is None or ids.shape[-1] != 1:
            output = None
            if ids is not None and ids.shape[0] == 1 and ids.shape[1] and not args[1:]:
                output = self._prompt_output(ids[0], cache, kwargs)
            if output is None:
                output = super().__call__(*args, **kwargs)  # type: ignore[misc]
            release()
            return output
        if not args[1:] and ids.numel() == 1 and _plain(kwargs, cache, 1):
            config: Any = self.config  # type: ignore[attr-defined]
            logits = torch.empty(config.vocab_size, device=ids.device)
            if self.step(int(ids), cache, logits):
                return CausalLMOutputWithPast(logits=logits[None, None], past_key_values=cache)
        with one_thread(), integer_activations():
            return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def _prompt_output(self, ids: Tensor, cache: Any, kwargs: dict[str, Any]) -> Any:
        if not _plain(kwargs, cache, len(ids)):
            return None
        logits = self.prompt(ids, cache, min(kwargs.get("logits_to_keep", 0) or len(ids), len(ids)))
        if logits is None:
            return None
        return CausalLMOutputWithPast(logits=logits[None], past_key_values=cache)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' own generate; pass `past_key_values` or `use_cache` to choose a cache."""
        if not {"past_key_values", "use_cache", "cache_implementation"} & kwargs.keys():
            kwargs["past_key_values"] = self.new_cache()
            given = getattr(kwargs.get("generation_config"), "prefill_chunk_size", None)
            kwargs.setdefault("prefill_chunk_size", given or PREFILL_CHUNK)
        return super().generate(*args, **kwargs)  # type: ignore[misc]


_UNDERSTOOD = {
    "input_ids", "past_key_values", "use_cache", "logits_to_keep", "return_dict",
    "attention_mask", "position_ids", "cache_position",
}  # fmt: skip


def _plain(kwargs: dict[str, Any], cache: Any, new: int) -> bool:
    """Whether a call asks for no more than the logits of `new` tokens after all of `cache`."""
    if type(cache) is not DenseCache or kwargs.keys() - _UNDERSTOOD:
        return False
    if kwargs.get("use_cache") is False or kwargs.get("return_dict") is False:
        return False
    keep = kwargs.get("logits_to_keep", 0)
    if type(keep) is not int or keep < 0 or (new == 1 and keep > 1):
        return False
    length, mask = cache.length, kwargs.get("attention_mask")
    if mask is not None and (mask.shape != (1, length + new) or not bool(mask.all())):
        return False
    wanted = list(range(length, length + new))
    places = (kwargs.get("position_ids"), kwargs.get("cache_position"))
    return all(place is None or place.flatten().tolist() == wanted for place in places)


def load(
    directory: str | Path,
    memory: int | str | None = None,
    weights: int | str | None = None,
    context: int | None = None,
    batch: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Any:
    """Open an artifact at a size: a transformers model with `artifact`, `plan` and `resize`.

    memory: bytes in total, for `context` tokens in each of `batch` sequences; weights: bytes of
    weights alone; sizes as numbers or text ("128MiB"). device: "cpu", "cuda" or "auto", where it
    is read to and runs. dtype: what it computes in; 32 bits on a CPU, bfloat16 on a GPU.
    """
    return open_model(directory, memory, weights, context, batch, dtype, device, RunningModel)
