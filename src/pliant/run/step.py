"""One token, or a piece of a prompt, through a whole model in one native call.

transformers spends more time between the products of a small model than in them. For models of
the Llama family whose weights are codes that the native kernels know, this runs the same
computation on the same cache: norms, projections, rotary positions, attention, the gated MLP and
the head. It keeps addresses, never a decoded weight; what changes under them is noticed before they
are used.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pliant.cache import DenseCache
from pliant.cache.dense import DenseLayer
from pliant.kernels.cpu import PIECE, activation_bits, aligned, pages
from pliant.kernels.cpu.build import library
from pliant.kernels.cpu.structs import Layer, Linear, Row, Step, Unsuited, address, linear
from pliant.run.family import Description, Product

Pages = array
"""Of int64: for each page of a sequence, in order, the address of its data and its bits."""


class NativeStep:
    """A model's description for the native step; Unsuited when it has none.

    Good for the codes that the model holds now: `current` tells whether it still does.
    """

    def __init__(self, model: Any) -> None:
        native = library()
        if native is None:
            raise Unsuited("there are no native kernels")
        self._native = native
        self._parts = Description(model, torch.device("cpu"), (torch.float32,))
        self._bound: tuple[Any, ...] | None = None
        self._scratch = aligned(0)
        self.vocabulary = 0
        self._describe()
        pages.collapse(t for code in self._parts.codes() for t in code.tensors().values())

    def current(self) -> bool:
        """Whether the model still is what was described: its modules, codes and tensors."""
        return self._parts.current()

    def hooked(self) -> bool:
        """Whether someone wants to see what passes through a module."""
        return self._parts.hooked()

    def run(self, token: int, cache: Any, logits: Tensor) -> bool:
        """Append one token to `cache`, write what follows to `logits` (float32 [vocabulary]).

        False, and nothing done, where the cache is not a filled one of one sequence that fits.
        """
        if not 0 <= token < self.vocabulary or not self._bind(cache):
            return False
        codes = self._parts.codes()  # they stay until the call is over
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
        codes = self._parts.codes()
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
                shared.data_ptr(), None, 0, threads,
            ):  # fmt: skip
                return False
        for layer in cache.layers:
            layer.length += n
        del codes
        return True

    def rows(self, rows: Sequence[tuple[int, int, Pages]], page_tokens: int, out: Tensor) -> bool:
        """The next token of several sequences at once: (token, position, pages) of each.

        pages: with room for the token, whose page is not coded and held by nobody else. out:
        float32 logits [len(rows), vocabulary]. A row's numbers depend on its own sequence alone.
        False, and nothing done, for a token that there is not.
        """
        if not all(0 <= token < self.vocabulary for token, _, _ in rows):
            return False
        if len(rows) == 1:  # the kernel writes two rows at least
            pair = torch.empty(2, self.vocabulary)
            done = self._rows(rows, page_tokens, pair)
            out.copy_(pair[:1])
            return done
        return self._rows(rows, page_tokens, out)

    def _rows(self, rows: Sequence[tuple[int, int, Pages]], page_tokens: int, out: Tensor) -> bool:
        codes = self._parts.codes()
        to = address(out, (max(len(rows), 2), self.vocabulary), torch.float32)
        self._step.activations = activation_bits(eight=False)
        step, threads = ctypes.byref(self._step), torch.get_num_threads()
        made = (Row * len(rows))(
            *(Row(pages.buffer_info()[0], token, position) for token, position, pages in rows)
        )
        longest = max(position for _, position, _ in rows) + 1
        shared = self._room(self._native.pliant_rows_bytes(step, len(rows)))
        done = self._native.pliant_rows(
            step, made, len(rows), page_tokens, longest, to, shared.data_ptr(), threads
        )
        del codes
        return bool(done)

    def paged_prompt(
        self, tokens: Sequence[int], position: int, pages: Pages, page_tokens: int, out: Tensor
    ) -> bool:
        """`tokens` behind the `position` that `pages` hold, for which they have room.

        out: as of `prompt`. A token's numbers do not depend on how a prompt is cut.
        """
        n, alone = len(tokens), out.dim() == 1
        if min(tokens) < 0 or max(tokens) >= self.vocabulary:
            return False
        codes = self._parts.codes()
        last = 0 if alone else len(out)
        shape = (self.vocabulary,) if alone else (last, self._step.hidden)
        to = address(out, shape, torch.float32)
        step, threads = ctypes.byref(self._step), torch.get_num_threads()
        ids = array("q", tokens)
        shared = self._room(self._native.pliant_prompt_bytes(step, min(n, PIECE)))
        for start in range(0, n, PIECE):
            count = min(n - start, PIECE)
            first = min(max(n - last - start, 0), count)
            states = to + 4 * self._step.hidden * max(start - (n - last), 0)
            logits = to if alone and start + count == n else None
            if not self._native.pliant_prompt(
                step, ids.buffer_info()[0] + 8 * start, count, position + start, first, states,
                logits, shared.data_ptr(), pages.buffer_info()[0], page_tokens, threads,
            ):  # fmt: skip
                return False
        del codes
        return True

    def _room(self, nbytes: int) -> Tensor:
        """Memory of at least so many bytes that is kept between calls."""
        if self._scratch.nbytes < nbytes:
            self._scratch = aligned(nbytes)
        return self._scratch

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
        if not cache.takes(more):
            return False
        layers = cache.layers
        first = layers[0]
        shape = (1, self._step.kv_heads, first.capacity, self._step.head_dim)
        places = []
        for layer in layers:
            for side in (layer.keys, layer.values):
                if side.shape != shape or side.dtype != torch.bfloat16 or not side.is_contiguous():
                    return False
                places.append(side.data_ptr())
        if self._bound != (shape, places):
            for i in range(len(layers)):
                self._layers[i].keys, self._layers[i].values = places[2 * i : 2 * i + 2]
            self._step.capacity = first.capacity
            self._bound = (shape, places)
        return bool(first.keys.device.type == "cpu")

    def _describe(self) -> None:
        parts = self._parts
        self._layers = (Layer * len(parts.blocks))()
        step = self._step = Step(
            layers=self._layers, layer_count=len(parts.blocks), hidden=parts.hidden,
            heads=parts.heads, kv_heads=parts.kv_heads, head_dim=parts.head_dim, inner=parts.inner,
            epsilon=parts.epsilon, rope_scale=parts.rope_scale, score_scale=parts.score_scale,
        )  # fmt: skip
        step.inverse_frequencies = parts.frequencies.data_ptr()
        for made, block in zip(self._layers, parts.blocks, strict=True):
            for name in ("q", "k", "v", "o", "gate", "up", "down"):
                setattr(made, name, self._linear(getattr(block, name)))
            for name in ("attention_norm", "mlp_norm", "query_norm", "key_norm"):
                norm = getattr(block, name)
                setattr(made, name, None if norm is None else norm.data_ptr())
        step.final_norm = parts.final_norm.data_ptr()
        step.embedding, step.head = self._linear(parts.embedding), self._linear(parts.head)
        self.vocabulary = parts.vocabulary
        self._shared = aligned(4 * self._native.pliant_shared_floats(ctypes.byref(step)))
        step.shared = self._shared.data_ptr()
        self._counters = (ctypes.c_int64 * (4 * len(parts.blocks) + 1))()
        step.counters = ctypes.addressof(self._counters)

    def _linear(self, product: Product) -> Linear:
        return linear(product.code, product.bias)
