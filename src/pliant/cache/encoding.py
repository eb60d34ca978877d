"""What a page holds, in bytes: plain 16-bit rows, or codes of 8, 4, 3 or 2 bits.

Keys are rounded per channel within a page, values per token, each on a uniform grid between its
least and its greatest value, whose step and start are kept as float16. Sources: "KIVI: A
Tuning-Free Asymmetric 2bit Quantization for KV Cache" and "KVQuant: Towards 10 Million Context
Length LLM Inference with KV Cache Quantization". Keys are coded as the cache gets them, which is
after rotary embedding.

Steps and starts take 32 / tokens bits a key and 32 / value_dim bits a value on top: with pages of
16 tokens and heads of 64, 4 bits are 5.25 in all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from pliant.codes.packing import PLANES, pack, plane_bytes, unpack
from pliant.errors import PliantError, UnsupportedModelError
from pliant.plan import attention_shapes
from pliant.plan.memory import text_config

CODED_BITS = (8, 4, 3, 2)
"""Widths that a page can be made smaller to."""

PAGE_TOKENS = 16
_SCALE_BYTES = 2  # float16


@dataclass(frozen=True)
class PageShape:
    """Keys and values of `tokens` tokens in all layers.

    kv_heads, key_dim, value_dim: of every layer. dtype: of pages that are not coded.
    """

    layers: int
    kv_heads: int
    key_dim: int
    value_dim: int
    tokens: int = PAGE_TOKENS
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        sizes = (self.layers, self.kv_heads, self.key_dim, self.value_dim, self.tokens)
        if min(sizes) < 1:
            raise PliantError(f"sizes of a page must be positive: {self}")
        if not self.dtype.is_floating_point or self.dtype.itemsize < 2:
            raise PliantError(f"pages are stored in 16 or 32 bits, not as {self.dtype}")

    @classmethod
    def of(
        cls, config: Any, tokens: int = PAGE_TOKENS, dtype: torch.dtype = torch.bfloat16
    ) -> PageShape:
        """The pages of a model with this configuration.

        UnsupportedModelError where a layer does not keep keys and values of every token, or where
        layers differ in their heads.
        """
        name = getattr(config, "model_type", "?")
        shapes = attention_shapes(config)
        if len(shapes) != text_config(config).num_hidden_layers:
            raise UnsupportedModelError(
                f"{name} has layers that keep no keys and values of their own; a paged cache "
                "needs attention in every layer"
            )
        if any(shape.window is not None for shape in shapes):
            raise UnsupportedModelError(
                f"{name} has layers that attend within a window of tokens; a paged cache needs "
                "attention to all tokens in every layer"
            )
        if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=config).layers):
            raise UnsupportedModelError(
                f"{name} has layers that remember more than keys and values; a paged cache needs "
                "attention alone in every layer"
            )
        if len(set(shapes)) != 1:
            raise UnsupportedModelError(
                f"{name} has layers with different heads; a paged cache needs the same in all"
            )
        one = shapes[0]
        return cls(len(shapes), one.kv_heads, one.key_dim, one.value_dim, tokens, dtype)

    @property
    def bits(self) -> int:
        """Bits of a number on a page that is not coded."""
        return 8 * self.dtype.itemsize

    @property
    def keys(self) -> int:
        """Numbers of a token's keys in one layer."""
        return self.kv_heads * self.key_dim

    @property
    def width(self) -> int:
        """Numbers of a token's keys and values in one layer, keys first."""
        return self.kv_heads * (self.key_dim + self.value_dim)

    def nbytes(self, bits: int | None = None) -> int:
        """Bytes of a page: not coded, or of so many bits."""
        if bits is None or bits == self.bits:
            return self.layers * self.tokens * self.width * self.dtype.itemsize
        return self.layers * _Row(self, bits).nbytes

    def empty(self, bits: int, device: torch.device) -> Tensor:
        """A page of zeros: [layers, tokens, width] of `dtype`, or uint8 [layers, bytes] of codes.

        Zeros, since what lies behind a sequence's last token is multiplied by 0 and may not be NaN.
        """
        if bits == self.bits:
            return torch.zeros(
                self.layers, self.tokens, self.width, dtype=self.dtype, device=device
            )
        return torch.zeros(self.layers, _Row(self, bits).nbytes, dtype=torch.uint8, device=device)

    def pages(self, tokens: int) -> int:
        """Pages that so many tokens take."""
        return -(-tokens // self.tokens)


class _Row:
    """Where the parts of one layer's codes lie: planes of keys, of values, steps and starts."""

    def __init__(self, shape: PageShape, bits: int) -> None:
        if bits not in CODED_BITS:
            raise PliantError(f"a page has {shape.bits} bits or {CODED_BITS}, not {bits}")
        numbers = (shape.tokens * shape.keys, shape.tokens * (shape.width - shape.keys))
        planes = [plane_bytes(count, plane) for count in numbers for plane in PLANES[bits]]
        aligned = -sum(planes) % _SCALE_BYTES
        scales = [shape.keys, shape.keys, *(2 * [shape.tokens * shape.kv_heads])]
        self.sizes = [*planes, aligned, *(_SCALE_BYTES * count for count in scales)]
        self.planes = len(PLANES[bits])
        self.nbytes = sum(self.sizes)


def encode(data: Tensor, shape: PageShape, bits: int) -> Tensor:
    """`data` [layers, tokens, width] as codes of `bits` bits, uint8 [layers, bytes]."""
    row = _Row(shape, bits)
    keys, values = _sides(data.float(), shape)
    key_codes, *key_scales = on_grid(keys, bits, dim=1)
    values = values.reshape(shape.layers, -1, shape.value_dim)
    value_codes, *value_scales = on_grid(values, bits, dim=2)
    padding = data.new_zeros((shape.layers, row.sizes[2 * row.planes]), dtype=torch.uint8)
    return torch.cat(
        [
            *pack(key_codes.flatten(1), bits),
            *pack(value_codes.flatten(1), bits),
            padding,
            *(s.flatten(1).view(torch.uint8) for s in (*key_scales, *value_scales)),
        ],
        dim=1,
    )


def decode(rows: Tensor, shape: PageShape, bits: int, dtype: torch.dtype) -> Tensor:
    """Keys and values [n, tokens, width] of `rows`, uint8 [n, bytes]: one layer's of n pages."""
    row = _Row(shape, bits)
    parts = torch.split_with_sizes(rows, row.sizes, dim=1)
    scales: Iterator[Tensor] = (part.view(torch.float16).float() for part in parts[-4:])
    key_step, key_low, value_step, value_low = scales
    n, values = len(rows), shape.width - shape.keys
    keys = unpack(parts[: row.planes], bits, shape.tokens * shape.keys)
    key_states = keys.view(n, shape.tokens, shape.keys) * key_step[:, None] + key_low[:, None]
    coded = unpack(parts[row.planes : 2 * row.planes], bits, shape.tokens * values)
    value_states = coded.reshape(n, -1, shape.value_dim) * value_step[..., None]
    value_states += value_low[..., None]
    return torch.cat([key_states, value_states.view(n, shape.tokens, values)], -1).to(dtype)


def _sides(rows: Tensor, shape: PageShape) -> tuple[Tensor, Tensor]:
    """Keys and values of `rows` [..., width]."""
    return rows[..., : shape.keys], rows[..., shape.keys :]


def on_grid(numbers: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (uint8, as `numbers`), and the float16 steps and starts of the grid along `dim`."""
    most = 2**bits - 1
    low, high = numbers.amin(dim, keepdim=True), numbers.amax(dim, keepdim=True)
    limit = torch.finfo(torch.float16).max
    start = low.clamp(-limit, limit).half()
    step = ((high - start.float()) / most).clamp(0, limit).half()
    divisor = torch.where(step > 0, step.float(), 1.0)  # a constant is its own start
    codes = ((numbers - start.float()) / divisor).round_().clamp_(0, most)
    return codes.to(torch.uint8), step, start
