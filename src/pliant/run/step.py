"""One token, or a piece of a prompt, through a whole model in one native call.

transformers spends more time between the products of a small model than in them. For models of
the Llama family whose weights are codes that the native kernels know, this runs the same
computation on the same cache: norms, projections, rotary positions, attention, the gated MLP and
the head. It keeps addresses, never a decoded weight; what changes under them is noticed before they
are used.
"""

from __future__ import annotations

import ctypes
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from pliant.cache import DenseCache
from pliant.cache.dense import DenseLayer
from pliant.codes import Code, Dense
from pliant.kernels.cpu import PIECE, activation_bits, aligned, pages
from pliant.kernels.cpu.build import library
from pliant.kernels.cpu.structs import Layer, Linear, Step, Unsuited, address, linear
from pliant.model.coded import CodedWeight

_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_FIXED_ROPE = ("default", "linear", "llama3", "yarn")  # frequencies that no length changes
_ATTENTION = ("pliant_sdpa", "sdpa", "eager")


class NativeStep:
    """A model's description for the native step; Unsuited when it has none.

    Good for the codes that the model holds now: `current` tells whether it still does.
    """

    def __init__(self, model: Any) -> None:
        native = library()
        if native is None:
            raise Unsuited("there are no native kernels")
        self._native = native
        self._modules: list[tuple[dict[str, nn.Module | None], str, nn.Module]] = []
        self._weights: list[CodedWeight] = []
        self._codes: list[weakref.ref[Code]] = []
        self._fixed: list[tuple[Tensor, int]] = []
        self._hooks: list[dict[int, Any]] = []
        self._bound: tuple[Any, ...] | None = None
        self.vocabulary = 0
        self._describe(model)
        pages.collapse(
            tensor for weight in self._weights for tensor in weight.code.tensors().values()
        )

    def current(self) -> bool:
        """Whether the model still is what was described: its modules, codes and tensors."""
        return (
            all(inside[name] is module for inside, name, module in self._modules)
            and [weight.code for weight in self._weights] == [code() for code in self._codes]
            and all(tensor.data_ptr() == place for tensor, place in self._fixed)
        )

    def hooked(self) -> bool:
        """Whether someone wants to see what passes through a module."""
        return any(self._hooks)

    def run(self, token: int, cache: Any, logits: Tensor) -> bool:
        """Append one token to `cache`, write what follows to `logits` (float32 [vocabulary]).

        False, and nothing done, where the cache is not a filled one of one sequence that fits.
        """
        if not 0 <= token < self.vocabulary or not self._bind(cache):
            return False
        codes = [weight.code for weight in self._weights]  # they stay until the call is over
        to = address(logits, (self.vocabulary,), torch.float32)
        position = cache.layers[0].length
        self._step.activations = activation_bits(eight=True)
        threads = torch.get_num_threads()
        if not self._native.pliant_step(ctypes.byref(self._step), token, position, to, threads):
            return False
        for layer in cache.layers:
            layer.length += 1
        del codes
        return True

    def prompt(self, tokens: Tensor, cache: Any, out: Tensor) -> bool:
        """Append `tokens` [n] to `cache` and write what follows the last of them.

        out: float32, logits [vocabulary] after the last one, or what the head reads of the last
        ones [some, hidden]. False, and nothing done, where the cache is not one of one sequence
        that they fit into.
        """
        ids = tokens.to("cpu", torch.int64).contiguous()
        n, alone = len(ids), out.dim() == 1
        if not n or int(ids.min()) < 0 or int(ids.max()) >= self.vocabulary:
            return False
        if not self._begin(cache) or not self._bind(cache, n):
            return False
        codes = [weight.code for weight in self._weights]
        last = 0 if alone else len(out)
        shape = (self.vocabulary,) if alone else (min(last, n), self._step.hidden)
        to = address(out, shape, torch.float32)
        step, threads = ctypes.byref(self._step), torch.get_num_threads()
        shared = aligned(self._native.pliant_prompt_bytes(step, min(n, PIECE)))
        position = cache.layers[0].length
        for start in range(0, n, PIECE):
            count = min(n - start, PIECE)
            first = min(max(n - last - start, 0), count)
            states = to + 4 * self._step.hidden * max(start - (n - last), 0)
            logits = to if alone and start + count == n else None
            if not self._native.pliant_prompt(
                step, ids[start:].data_ptr(), count, position + start, first, states, logits,
                shared.data_ptr(), threads,
            ):  # fmt: skip
                return False
        for layer in cache.layers:
            layer.length += n
        del codes
        return True

    def _begin(self, cache: Any) -> bool:
        """Let an empty cache take its memory."""
        if type(cache) is not DenseCache:
            return False
        nothing = torch.empty(1, self._step.kv_heads, 0, self._step.head_dim)
        for layer in cache.layers:
            if type(layer) is not DenseLayer:
                return False
            if not layer.is_initialized:
                layer.lazy_initialization(nothing, nothing)
        return True

    def _bind(self, cache: Any, more: int = 1) -> bool:
        """Point the step at the storage of `cache`, if `more` tokens fit into it."""
        if type(cache) is not DenseCache or len(cache.layers) != self._step.layer_count:
            return False
        layers = cache.layers
        first = layers[0]
        if type(first) is not DenseLayer or not first.is_initialized:
            return False
        shape = (1, self._step.kv_heads, first.capacity, self._step.head_dim)
        places = []
        for layer in layers:
            if type(layer) is not DenseLayer or layer.length != first.length:
                return False
            if not layer.is_initialized or layer.length + more > min(layer.capacity, layer.context):
                return False
            for side in (layer.keys, layer.values):
                if side.shape != shape or side.dtype != torch.bfloat16 or not side.is_contiguous():
                    return False
                places.append(side.data_ptr())
        if self._bound != (shape, places):
            for i in range(len(layers)):
                self._layers[i].keys, self._layers[i].values = places[2 * i : 2 * i + 2]
            self._step.capacity = first.capacity
            self._bound = (shape, places)
        return first.keys.device.type == "cpu"

    def _describe(self, model: Any) -> None:
        config = model.config
        family = config.model_type
        body = getattr(model, "model", None)
        if family not in _FAMILIES or body is None or model.training:
            raise Unsuited(family)
        if config.hidden_act != "silu" or config._attn_implementation not in _ATTENTION:
            raise Unsuited(f"{config.hidden_act}, {config._attn_implementation}")
        self._home = f"transformers.models.{family}.modeling_{family}"
        name = type(model).__name__
        if type(model).__module__ != self._home or not name.endswith("ForCausalLM"):
            raise Unsuited(name)
        self._module(model, "model")
        rotary = self._module(body, "rotary_emb")
        if rotary.rope_type not in _FIXED_ROPE:
            raise Unsuited(f"rotary positions of type {rotary.rope_type}")
        layers = self._module(body, "layers", nn.ModuleList)
        attention = layers[0].self_attn
        heads = config.num_attention_heads
        kv_heads, dim = config.num_key_value_heads, attention.head_dim
        self._layers = (Layer * len(layers))()
        step = self._step = Step(
            layers=self._layers, layer_count=len(layers), hidden=config.hidden_size,
            heads=heads, kv_heads=kv_heads, head_dim=dim, inner=config.intermediate_size,
            epsilon=config.rms_norm_eps, rope_scale=rotary.attention_scaling,
            score_scale=attention.scaling,
        )  # fmt: skip
        if heads % kv_heads or dim % 2:
            raise Unsuited(f"{heads} heads of {dim} over {kv_heads}")
        step.inverse_frequencies = self._tensor(rotary.inv_freq, dim // 2)
        for i, layer in enumerate(layers):
            self._module(layers, str(i))
            self._describe_layer(self._layers[i], layer)
        step.final_norm = self._norm(body, "norm", config.hidden_size)
        embedding = self._module(body, "embed_tokens", nn.Embedding)
        step.embedding = self._linear(embedding, config.vocab_size, config.hidden_size)
        head = self._module(model, "lm_head", nn.Linear)
        step.head = self._linear(head, config.vocab_size, config.hidden_size)
        self.vocabulary = config.vocab_size
        self._shared = torch.empty(self._native.pliant_shared_floats(ctypes.byref(step)) + 16)
        step.shared = -(-self._shared.data_ptr() // 64) * 64
        self._counters = (ctypes.c_int64 * (4 * len(layers) + 1))()
        step.counters = ctypes.addressof(self._counters)

    def _describe_layer(self, made: Layer, layer: Any) -> None:
        step = self._step
        attention, mlp = self._module(layer, "self_attn"), self._module(layer, "mlp")
        if getattr(attention, "sliding_window", None) is not None:
            raise Unsuited("a sliding window")
        if (attention.head_dim, attention.scaling) != (step.head_dim, self._scaling(attention)):
            raise Unsuited("layers of different heads")
        outer, kv = step.heads * step.head_dim, step.kv_heads * step.head_dim
        for name, owner, out, width in (
            ("q", attention, outer, step.hidden),
            ("k", attention, kv, step.hidden),
            ("v", attention, kv, step.hidden),
            ("o", attention, step.hidden, outer),
            ("gate", mlp, step.inner, step.hidden),
            ("up", mlp, step.inner, step.hidden),
            ("down", mlp, step.hidden, step.inner),
        ):
            module = self._module(owner, f"{name}_proj", nn.Linear)
            setattr(made, name, self._linear(module, out, width))
        made.attention_norm = self._norm(layer, "input_layernorm", step.hidden)
        made.mlp_norm = self._norm(layer, "post_attention_layernorm", step.hidden)
        if hasattr(attention, "q_norm"):
            made.query_norm = self._norm(attention, "q_norm", step.head_dim)
            made.key_norm = self._norm(attention, "k_norm", step.head_dim)

    def _scaling(self, attention: Any) -> float:
        """The scale of this layer's scores, if it is the step's (which has it as a float32)."""
        same = ctypes.c_float(attention.scaling).value == self._step.score_scale
        return float(attention.scaling) if same else float("nan")

    def _module(self, owner: Any, name: str, kind: type[nn.Module] | None = None) -> Any:
        """A submodule of transformers' own class (or of exactly `kind`), to be watched."""
        module = owner._modules.get(name)
        known = type(module) is kind if kind else type(module).__module__ == self._home
        if module is None or not known:
            raise Unsuited(f"{name} is a {type(module).__name__}")
        self._modules.append((owner._modules, name, module))
        self._hooks += [module._forward_hooks, module._forward_pre_hooks]
        return module

    def _linear(self, module: Any, out: int, width: int) -> Linear:
        weight = module.weight
        if isinstance(weight, CodedWeight):
            if weight.transposed:
                raise Unsuited("a transposed weight")
            code = weight.code
            self._weights.append(weight)
            self._codes.append(weakref.ref(code))
        else:
            self._tensor(weight, out, width)
            code = Dense(weight.detach())
        if code.shape != (out, width):
            raise Unsuited(f"{code.shape} where {(out, width)} is expected")
        bias = getattr(module, "bias", None)
        if bias is not None:
            self._tensor(bias, out)
        return linear(code, bias)

    def _norm(self, owner: Any, name: str, width: int) -> int:
        module = self._module(owner, name)
        if ctypes.c_float(module.variance_epsilon).value != self._step.epsilon:
            raise Unsuited("norms of different epsilons")
        return self._tensor(module.weight, width)

    def _tensor(self, tensor: Tensor, *shape: int) -> int:
        """The address of a float32 tensor, to be watched."""
        place = address(tensor, shape, torch.float32)
        self._fixed.append((tensor, place))
        return place
