"""Models of the Llama family as their parts, for steps that do not go through their modules.

What is described is watched: modules, codes and tensors may be replaced, and someone may hook into
what passes through a module.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pliant.codes import Code, Dense
from pliant.kernels.cpu.structs import Unsuited
from pliant.model.coded import CodedWeight

_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_FIXED_ROPE = ("default", "linear", "llama3", "yarn")  # frequencies that no length changes
_ATTENTION = ("pliant_sdpa", "sdpa", "eager")


@dataclass(frozen=True, eq=False)
class Product:
    """A linear layer, or an embedding: a weight [out, in] and a bias [out] or None."""

    weight: CodedWeight | Tensor
    bias: Tensor | None

    @property
    def code(self) -> Code:
        """The weight as it is now: a code may be replaced, and must not be kept alive."""
        weight = self.weight
        return weight.code if isinstance(weight, CodedWeight) else Dense(weight.detach())


@dataclass(frozen=True, eq=False)
class Block:
    """A layer: its seven products and the weights of its norms (of queries and keys in Qwen3)."""

    q: Product
    k: Product
    v: Product
    o: Product
    gate: Product
    up: Product
    down: Product
    attention_norm: Tensor
    mlp_norm: Tensor
    query_norm: Tensor | None
    key_norm: Tensor | None


class Description:
    """The parts of a model; Unsuited where its forward is not that of the Llama family.

    Plain tensors (norms, biases, dense weights, frequencies) are contiguous, on one device and of
    one of `dtypes`.
    """

    def __init__(self, model: Any, device: torch.device, dtypes: Sequence[torch.dtype]) -> None:
        self.device, self._dtypes = device, dtypes
        self._inside: list[tuple[dict[str, Any], str, Any]] = []
        self._weights: list[CodedWeight] = []
        self._codes: list[weakref.ref[Code]] = []
        self._fixed: list[tuple[Tensor, int]] = []
        self._hooks: list[dict[int, Any]] = []
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
        self.hidden, self.inner = config.hidden_size, config.intermediate_size
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim: int = attention.head_dim
        self.score_scale: float = attention.scaling
        self.epsilon: float = config.rms_norm_eps
        self.rope_scale: float = rotary.attention_scaling
        self.vocabulary: int = config.vocab_size
        if self.heads % self.kv_heads or self.head_dim % 2:
            raise Unsuited(f"{self.heads} heads of {self.head_dim} over {self.kv_heads}")
        self.frequencies = self._tensor(rotary, "inv_freq", self.head_dim // 2)
        self.blocks = [self._block(self._module(layers, str(i))) for i in range(len(layers))]
        self.final_norm = self._norm(body, "norm", self.hidden)
        embedding = self._module(body, "embed_tokens", nn.Embedding)
        self.embedding = self._product(embedding, self.vocabulary, self.hidden)
        head = self._module(model, "lm_head", nn.Linear)
        self.head = self._product(head, self.vocabulary, self.hidden)

    def current(self) -> bool:
        """Whether the model still is what was described: its modules, codes and tensors."""
        return (
            all(inside.get(name) is part for inside, name, part in self._inside)
            and self.same_codes()
            and all(tensor.data_ptr() == place for tensor, place in self._fixed)
        )

    def same_codes(self) -> bool:
        """Whether no code was replaced."""
        return self.codes() == [code() for code in self._codes]

    def codes(self) -> list[Code]:
        """The codes that the model holds now; they stay while the list does."""
        return [weight.code for weight in self._weights]

    def hooked(self) -> bool:
        """Whether someone wants to see what passes through a module."""
        return any(self._hooks)

    def _block(self, layer: Any) -> Block:
        attention, mlp = self._module(layer, "self_attn"), self._module(layer, "mlp")
        if getattr(attention, "sliding_window", None) is not None:
            raise Unsuited("a sliding window")
        if (attention.head_dim, attention.scaling) != (self.head_dim, self.score_scale):
            raise Unsuited("layers of different heads")
        outer, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        products: dict[str, Any] = {}
        for name, owner, out, width in (
            ("q", attention, outer, self.hidden),
            ("k", attention, kv, self.hidden),
            ("v", attention, kv, self.hidden),
            ("o", attention, self.hidden, outer),
            ("gate", mlp, self.inner, self.hidden),
            ("up", mlp, self.inner, self.hidden),
            ("down", mlp, self.hidden, self.inner),
        ):
            module = self._module(owner, f"{name}_proj", nn.Linear)
            products[name] = self._product(module, out, width)
        normed = hasattr(attention, "q_norm")
        return Block(
            **products,
            attention_norm=self._norm(layer, "input_layernorm", self.hidden),
            mlp_norm=self._norm(layer, "post_attention_layernorm", self.hidden),
            query_norm=self._norm(attention, "q_norm", self.head_dim) if normed else None,
            key_norm=self._norm(attention, "k_norm", self.head_dim) if normed else None,
        )

    def _module(self, owner: Any, name: str, kind: type[nn.Module] | None = None) -> Any:
        """A submodule of transformers' own class (or of exactly `kind`), to be watched."""
        module = owner._modules.get(name)
        known = type(module) is kind if kind else type(module).__module__ == self._home
        if module is None or not known:
            raise Unsuited(f"{name} is a {type(module).__name__}")
        self._inside.append((owner._modules, name, module))
        self._hooks += [module._forward_hooks, module._forward_pre_hooks]
        return module

    def _product(self, module: Any, out: int, width: int) -> Product:
        weight = module.weight
        if isinstance(weight, CodedWeight):
            if weight.transposed:
                raise Unsuited("a transposed weight")
            if weight.code.shape != (out, width):
                raise Unsuited(f"{weight.code.shape} where {(out, width)} is expected")
            if weight.device != self.device:
                raise Unsuited(f"a code on {weight.device}")
            self._inside.append((module._modules, "weight", weight))
            self._weights.append(weight)
            self._codes.append(weakref.ref(weight.code))
        else:
            weight = self._tensor(module, "weight", out, width)
        bias = getattr(module, "bias", None)
        return Product(weight, None if bias is None else self._tensor(module, "bias", out))

    def _norm(self, owner: Any, name: str, width: int) -> Tensor:
        module = self._module(owner, name)
        if module.variance_epsilon != self.epsilon:
            raise Unsuited("norms of different epsilons")
        return self._tensor(module, "weight", width)

    def _tensor(self, module: nn.Module, name: str, *shape: int) -> Tensor:
        """A parameter or buffer, to be watched."""
        inside = module._parameters if name in module._parameters else module._buffers
        tensor = inside.get(name)
        if tensor is None or tensor.device != self.device or tensor.dtype not in self._dtypes:
            raise Unsuited(f"{name} is {'not there' if tensor is None else tensor.dtype}")
        if tuple(tensor.shape) != shape or not tensor.is_contiguous():
            raise Unsuited(f"{tuple(tensor.shape)} where {shape}, contiguous, is expected")
        self._inside.append((inside, name, tensor))
        self._fixed.append((tensor, tensor.data_ptr()))
        return tensor
