"""What a running model holds besides its weights: KV cache, and activations at their peak.

Everything follows from the configuration, so a plan needs no weights. The activation model is that
of the CPU runtime: prompts are prefilled in chunks, the KV cache is stored in 16 bits and cast to
the compute type in one buffer for all layers, query heads read the keys that they share in place,
and a coded matrix is decoded through a bounded scratch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pliant.budget import Budget, format_size
from pliant.errors import BudgetError, UnsupportedModelError

SCRATCH_BYTES = 2 << 20
"""The most that a kernel decodes of one matrix at a time (see pliant.kernels)."""

LIBRARY_BYTES = 3 << 20
"""Thread pools and packing buffers of the BLAS, which stay after the first matrix multiply."""

LAYER_OBJECT_BYTES = 96 << 10
"""Modules of a layer as Python holds them, and its codes' last pages, which are partly empty."""

PREFILL_CHUNK = 128

_STATELESS = {"linear_attention", "conv", "mamba", "moe", "mlp", "dummy", "recurrent"}
_WINDOWED = {"sliding_attention", "chunked_attention", "hybrid_sliding"}


@dataclass(frozen=True)
class Breakdown:
    """Where a budget's bytes go. `free` is what is left of the budget."""

    weights: int
    embeddings: int
    kv_cache: int
    activations: int
    free: int

    @property
    def total(self) -> int:
        """Bytes in use: everything but `free`."""
        return self.weights + self.embeddings + self.kv_cache + self.activations

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class AttentionShape:
    """One layer's attention as the KV cache sees it. window: None where it reaches every token."""

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None

    @property
    def cached_values(self) -> int:
        """Numbers that the cache keeps for a token."""
        return self.kv_heads * (self.key_dim + self.value_dim)

    def length(self, context: int) -> int:
        """Tokens that the cache holds when the sequence has `context`."""
        return context if self.window is None else min(context, self.window)


def kv_cache_bytes(config: Any, context: int, batch: int, dtype_bytes: int = 2) -> int:
    """Bytes of keys and values of `batch` sequences of `context` tokens.

    Layers with a sliding window hold no more than it; layers that reuse another's keys, and
    recurrent ones, hold none (the fixed state of a recurrent layer is not counted).
    """
    values = sum(s.cached_values * s.length(context) for s in attention_shapes(config))
    return values * batch * dtype_bytes


def activation_bytes(
    config: Any,
    context: int,
    batch: int,
    *,
    prefill_chunk: int = PREFILL_CHUNK,
    dtype_bytes: int = 4,
) -> int:
    """Peak bytes of activations while `batch` sequences grow to `context` tokens.

    The largest of three moments in a layer, over what stays throughout: buffers of libraries, the
    objects of the model, the mask, and one layer's keys and values in the compute type. Attention:
    queries, outputs and the float mask. MLP: its intermediates and a decoded tile. Head: the last
    position's logits in 32 bits, twice (sampling copies them), and a tile. Pages of shared
    libraries, which the process has in any case, are not counted.
    """
    text = text_config(config)
    tokens = batch * min(prefill_chunk, context)
    hidden, vocabulary = _need(text, "hidden_size"), _need(text, "vocab_size")
    shapes = attention_shapes(config)
    mask = batch * min(prefill_chunk, context) * context
    stream = 2 * tokens * hidden * dtype_bytes  # the residual and its normalised copy
    cast = max((s.cached_values * s.length(context) for s in shapes), default=0) * batch
    cast *= dtype_bytes if dtype_bytes != 2 else 0  # 16-bit models read the cache itself
    objects = LAYER_OBJECT_BYTES * _need(text, "num_hidden_layers")
    attention = max(
        (_attention_bytes(text, s, context, batch, tokens, dtype_bytes) for s in shapes), default=0
    )
    mlp = _mlp_width(text) * tokens * dtype_bytes + SCRATCH_BYTES
    head = batch * vocabulary * 4 * 2 + SCRATCH_BYTES
    stays = LIBRARY_BYTES + objects + mask + cast
    return stays + max(stream + attention, stream + mlp, head)


def serving_bytes(config: Any, context: int, most: int, dtype_bytes: int = 4) -> int:
    """Activations at their peak where up to `most` sequences share a pass.

    A pass takes a chunk of one prompt and a token of every other sequence, whose rows and logits
    come on top of what one sequence needs.
    """
    text = text_config(config)
    hidden, vocabulary = _need(text, "hidden_size"), _need(text, "vocab_size")
    row = (2 * hidden + _mlp_width(text)) * dtype_bytes + 2 * vocabulary * 4
    return activation_bytes(config, context, 1, dtype_bytes=dtype_bytes) + (most - 1) * row


def weights_budget(config: Any, budget: Budget) -> int:
    """Bytes that the budget leaves for weights and embeddings.

    Raises BudgetError when the KV cache and the activations alone take all of it.
    """
    cache = kv_cache_bytes(config, budget.context, budget.batch)
    activations = activation_bytes(config, budget.context, budget.batch)
    left = budget.memory - cache - activations
    if left <= 0:
        raise BudgetError(
            f"{format_size(budget.memory)} leaves nothing for weights: at context {budget.context} "
            f"and batch {budget.batch} the KV cache takes {format_size(cache)} and activations "
            f"{format_size(activations)}; lower --context or --batch, or raise --memory above "
            f"{format_size(cache + activations)}"
        )
    return left


def text_config(config: Any) -> Any:
    """The language model's part of a configuration (the whole of it for a text model)."""
    get = getattr(config, "get_text_config", None)
    return config if get is None else get(decoder=True)


def attention_shapes(config: Any) -> list[AttentionShape]:
    """The attention of each layer that keeps keys and values of its own."""
    text = text_config(config)
    layers, heads = _need(text, "num_hidden_layers"), _need(text, "num_attention_heads")
    kinds = list(getattr(text, "layer_types", None) or [])
    window = _first(text, "sliding_window", "attention_chunk_size")
    if not kinds:
        kinds = ["full_attention" if window is None else "sliding_attention"] * layers
    kinds = kinds[: layers - int(getattr(text, "num_kv_shared_layers", 0) or 0)]
    kv_heads = 1 if getattr(text, "multi_query", False) else None
    kv_heads = kv_heads or _first(text, "num_key_value_heads", "num_kv_heads") or heads
    key_dim = value_dim = _first(text, "head_dim") or _need(text, "hidden_size") // heads
    if _first(text, "kv_lora_rank"):  # multi-head latent attention, cached after its expansion
        key_dim = _need(text, "qk_nope_head_dim") + _need(text, "qk_rope_head_dim")
        value_dim, kv_heads = _need(text, "v_head_dim"), heads
    shapes = []
    for kind in kinds:
        if kind in _STATELESS:
            continue
        key, value, shared = key_dim, value_dim, kv_heads
        if kind == "full_attention" and _first(text, "global_head_dim"):
            key = value = _need(text, "global_head_dim")
            shared = _first(text, "num_global_key_value_heads") or kv_heads
        shapes.append(
            AttentionShape(heads, shared, key, value, window if kind in _WINDOWED else None)
        )
    return shapes


def _attention_bytes(
    text: Any, shape: AttentionShape, context: int, batch: int, tokens: int, dtype_bytes: int
) -> int:
    """Queries, outputs, new keys and values, and the float mask.

    The fused kernel makes the float mask anew in each layer; as measured at long contexts, the heap
    holds the one before as well.
    """
    chunk = tokens // batch
    length = context if shape.window is None else min(context, shape.window + chunk)
    per_head = shape.key_dim + shape.value_dim
    own = tokens * (shape.heads + shape.kv_heads) * per_head  # q and out, new k and v
    mask = 2 * batch * chunk * length
    scores = 0
    if _first(text, "attn_logit_softcapping"):  # no fused kernel: scores, capped, softmax
        expanded = batch * length * shape.heads * per_head if shape.heads > shape.kv_heads else 0
        scores = 3 * tokens * shape.heads * length + expanded
    return (own + mask + scores) * dtype_bytes


def _mlp_width(text: Any) -> int:
    """Intermediate numbers per token: gate, up and their product, over all experts of a token."""
    width = _first(text, "intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
    width = max(width) if isinstance(width, (list, tuple)) else width
    width = width or 4 * int(_need(text, "hidden_size"))
    experts = _first(text, "num_experts_per_tok", "num_experts_per_token", "moe_topk")
    if not experts:
        return 3 * int(width)
    routed = _first(text, "moe_intermediate_size") or width
    hidden = int(_need(text, "hidden_size"))
    return max(3 * int(width), int(experts) * (3 * int(routed) + 2 * hidden))


def _first(config: Any, *names: str) -> Any:
    """The first of these attributes that is set."""
    return next((v for n in names if (v := getattr(config, n, None)) is not None), None)


def _need(config: Any, name: str) -> int:
    value = getattr(config, name, None)
    if value is None:
        raise UnsupportedModelError(
            f"the configuration of {getattr(config, 'model_type', 'this model')!r} has no "
            f"{name!r}, which a decoder-only language model has; its memory cannot be planned"
        )
    return int(value)
