"""A KV cache that takes its memory once: context x batch, in 16 bits, however it is filled.

transformers' own dynamic cache grows by concatenation, so that at its peak it holds every layer
twice over in the model's dtype. This one writes into storage of its final size, in bfloat16 even
when the model computes in float32, and hands out only the part that is filled. Where the dtypes
differ, it is cast into one buffer that all layers share.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from pliant.errors import PliantError


class CastBuffer:
    """Memory that every layer of a cache casts its keys (or values) into, one after the other."""

    def __init__(self) -> None:
        self._flat = torch.empty(0)

    def take(self, shape: tuple[int, ...], most: int, like: Tensor) -> Tensor:
        """`shape` of the buffer in `like`'s dtype, which is made for `most` numbers at once.

        What an earlier call gave out is overwritten.
        """
        flat = self._flat
        if flat.numel() < most or flat.dtype != like.dtype or flat.device != like.device:
            self._flat = flat = torch.empty(0)  # the old one goes first
            self._flat = flat = torch.empty(most, dtype=like.dtype, device=like.device)
        return flat[: math.prod(shape)].view(shape)

    @property
    def nbytes(self) -> int:
        return int(self._flat.nbytes)


class DenseLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values [batch, heads, capacity, head_dim] of one attention layer.

    casts: buffers for keys and values in the model's dtype that layers share, or None: what
    `update` returns is then the caller's own.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(
        self,
        context: int,
        batch: int,
        dtype: torch.dtype,
        casts: tuple[CastBuffer, CastBuffer] | None = None,
    ) -> None:
        super().__init__()
        self.context, self.max_batch, self.storage = context, batch, dtype
        self.casts = casts
        self.capacity = context
        self.length = 0  # tokens seen; all of them are stored

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, width = key_states.shape
        if batch > self.max_batch:
            raise PliantError(
                f"a batch of {batch} sequences does not fit a KV cache planned for "
                f"{self.max_batch}; open the model with batch={batch}"
            )
        self.dtype, self.device = self.storage, key_states.device
        shape = (batch, heads, self.capacity, width)
        self.keys = torch.empty(shape, dtype=self.storage, device=self.device)
        shape = (*value_states.shape[:2], self.capacity, value_states.shape[-1])
        self.values = torch.empty(shape, dtype=self.storage, device=self.device)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store [batch, heads, new, head_dim] more; returns all that is stored, in their dtype.

        It is the caller's until the next layer's update, which may overwrite it.
        """
        self._admit(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[-2]
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return (
            self._cast(0, self.keys[:, :, : self.length], key_states),
            self._cast(1, self.values[:, :, : self.length], value_states),
        )

    def _cast(self, side: int, stored: Tensor, like: Tensor, copy: bool = False) -> Tensor:
        """`stored` in `like`'s dtype: itself where that is its own and no copy is wanted."""
        if stored.dtype == like.dtype and not copy:
            return stored
        return self._room(side, stored.shape[-2], like).copy_(stored)

    def _room(self, side: int, tokens: int, like: Tensor) -> Tensor:
        """Memory for `tokens` keys (side 0) or values (side 1) shaped and typed like `like`."""
        batch, heads, _, width = like.shape
        shape = (batch, heads, tokens, width)
        if self.casts is None or torch.is_grad_enabled():
            return like.new_empty(shape)
        most = batch * heads * width * max(self.capacity, tokens)
        return self.casts[side].take(shape, most, like)

    def _admit(self, key_states: Tensor, value_states: Tensor) -> None:
        wanted = self.length + key_states.shape[-2]
        if wanted > self.context:
            raise PliantError(
                f"{wanted} tokens exceed the planned context of {self.context}; shorten the "
                f"prompt, generate fewer tokens, or open the model with context={wanted}"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[0] != self.keys.shape[0]:
            raise PliantError(
                f"the KV cache holds {self.keys.shape[0]} sequences, not {key_states.shape[0]}; "
                "reset it before another batch"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of storage; 0 before the first token."""
        return int(self.keys.nbytes + self.values.nbytes) if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.context

    def reset(self) -> None:
        """Forget every token; the storage stays."""
        self.length = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; transformers passes their number negated."""
        self.length = max(self.length - abs(tokens_to_remove), 0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self._select(torch.arange(self.keys.shape[0]).repeat_interleave(repeats))

    def _select(self, index: Tensor) -> None:
        if not self.is_initialized:
            return
        index = index.to(self.keys.device)
        if len(index) > self.max_batch:
            raise PliantError(
                f"a batch of {len(index)} sequences does not fit a KV cache planned for "
                f"{self.max_batch}; open the model with batch={len(index)}"
            )
        self.keys, self.values = self.keys[index], self.values[index]


class DenseSlidingLayer(DenseLayer):
    """A layer that attends to the last `window` tokens only, so that it stores no more."""

    is_sliding = True
    is_croppable = False

    def __init__(
        self,
        context: int,
        batch: int,
        dtype: torch.dtype,
        window: int,
        casts: tuple[CastBuffer, CastBuffer] | None = None,
    ) -> None:
        super().__init__(context, batch, dtype, casts)
        self.window = window
        self.capacity = min(context, window)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the newest states; returns the last window - 1 before them, and them."""
        self._admit(key_states, value_states)
        keys = self._append(0, self.keys, key_states)
        values = self._append(1, self.values, value_states)
        self.length += key_states.shape[-2]
        return keys, values

    @property
    def _kept(self) -> int:
        """Past tokens that a new one can still see, stored at the front."""
        return min(self.length, self.window - 1)

    def _append(self, side: int, stored: Tensor, states: Tensor) -> Tensor:
        past, new = self._kept, states.shape[-2]
        if past + new <= self.capacity:
            stored[:, :, past : past + new] = states
            shifts = past + new >= self.window  # below, under what is handed out
            full = self._cast(side, stored[:, :, : past + new], states, copy=shifts)
        else:  # the new states pass through storage's precision like all others
            full = self._room(side, past + new, states)
            full[:, :, :past] = stored[:, :, :past]
            full[:, :, past:] = states.to(stored.dtype)
        keep = min(self.length + new, self.window - 1)
        if keep < past + new:
            stored[:, :, :keep] = full[:, :, past + new - keep :]
        return full

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._kept + query_length, self.length - self._kept

    def get_max_length(self) -> int:
        return self.window

    def crop(self, tokens_to_remove: int) -> None:
        if abs(tokens_to_remove) and self.length >= self.window:
            raise PliantError("a sliding-window cache cannot bring back tokens that it let go")
        super().crop(tokens_to_remove)


class DenseCache(Cache):  # type: ignore[misc]
    """A preallocated KV cache for the transformers model of `config`.

    context: tokens a sequence may reach. batch: sequences at once. dtype: of storage. A layer's
    storage is taken at its first token and then keeps its size. Layers that hold no keys and
    values of their own (shared, recurrent) are transformers' own.
    """

    def __init__(
        self, config: Any, context: int, batch: int = 1, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        self.context, self.max_batch, self.storage = context, batch, dtype
        text = config.get_text_config(decoder=True)
        # A layer that lends its keys to later ones needs them to outlive the next layer's update.
        lends = bool(getattr(text, "num_kv_shared_layers", 0))
        self.casts = None if lends else (CastBuffer(), CastBuffer())
        super().__init__(
            layers=[self._layer(layer) for layer in DynamicCache(config=config).layers]
        )

    def _layer(self, like: Any) -> Any:
        if type(like) is DynamicSlidingWindowLayer:
            return DenseSlidingLayer(
                self.context,
                self.max_batch,
                self.storage,
                int(like.sliding_window),
                self.casts,
            )
        if type(like) is DynamicLayer:
            return DenseLayer(self.context, self.max_batch, self.storage, self.casts)
        return like

    @property
    def nbytes(self) -> int:
        """Bytes of all storage taken so far."""
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, DenseLayer))

    @property
    def length(self) -> int:
        """Tokens that each sequence has in the cache."""
        return cast(int, self.get_seq_length())

    def takes(self, more: int) -> bool:
        """Whether all layers are plain ones that have their memory, hold as many tokens each, and
        have room for `more`: what code that writes into their storage itself relies on.
        """
        length = self.length
        return all(
            type(layer) is DenseLayer
            and layer.is_initialized
            and layer.length == length
            and length + more <= min(layer.capacity, layer.context)
            for layer in self.layers
        )
