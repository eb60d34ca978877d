"""One token through a whole model as a CUDA graph: one launch, whatever the model's depth.

The products of `pliant.kernels.matmul` and few kernels between them (`kernels/triton/step.py`) run
on a token, a position and a cache that stay where they are, so that they are captured once and
replayed for each token. Another cache or another code makes the next token capture anew. On a CPU,
in Triton's interpreter, the same functions run as they are.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from pliant.cache import DenseCache
from pliant.cache.dense import DenseLayer
from pliant.codes import Code, GroupInt, GroupLevels, RowStack
from pliant.errors import PliantError
from pliant.kernels import matmul_each
from pliant.kernels.cpu.structs import Unsuited
from pliant.kernels.streams import aside
from pliant.kernels.triton import step as kernels
from pliant.model.coded import CodedWeight
from pliant.run.family import Block, Description, Product

_LOG = logging.getLogger(__name__)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_AGREEMENT = 1e-2  # of a replay's logits and those of the same launches outside of a graph


class GraphStep:
    """A model's description for the captured step; Unsuited when it has none.

    early: whether kernels overlap with those before them, None: where the GPU can. tile: tokens
    that attention takes at once.
    """

    def __init__(self, model: Any, early: bool | None = None, tile: int = kernels.TILE) -> None:
        weight = model.get_input_embeddings().weight
        self.device: torch.device = weight.device
        self.dtype: torch.dtype = weight.dtype
        if self.dtype not in _FLOATS:
            raise Unsuited(f"activations in {self.dtype}")
        self._stale = False
        self._parts = Description(model, self.device, _FLOATS)
        self._changes = CodedWeight.changes
        self.early = kernels.overlaps(self.device) if early is None else early
        self._tile = tile
        self._failed = False
        self._storage: list[tuple[Tensor, Tensor]] = []
        self._held: tuple[Any, ...] | None = None  # the cache that it is captured for
        self._graph: torch.cuda.CUDAGraph | None = None
        self._heads: kernels.Heads | None = None
        parts = self._parts

        def room(width: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.empty(1, width, dtype=dtype, device=self.device)

        self._token, self._position = room(1, torch.int64)[0], room(1, torch.int64)[0]
        self._residual = room(parts.hidden, torch.float32)
        self._normed, self._inner = room(parts.hidden), room(parts.inner)
        self._mixed = room(parts.heads * parts.head_dim)
        self._logits = self._normed[:0]

    @torch.inference_mode()
    def run(self, token: int, cache: Any, logits: Tensor) -> bool:
        """Append one token to `cache`, write what follows to `logits` [vocabulary].

        False where the cache is not a filled one of one sequence that fits, or the model is not
        what was described: then the cache holds no more than before.
        """
        if not 0 <= token < self._parts.vocabulary or not self._ready(cache, 1):
            return False
        self._token.fill_(token)
        self._position.fill_(cache.layers[0].length)
        self._launch()
        if not self._valid():
            return False
        logits.copy_(self._logits[0])
        for layer in cache.layers:
            layer.length += 1
        return True

    @torch.inference_mode()
    def greedy(self, token: int, cache: Any, count: int) -> Tensor | None:
        """The `count` likeliest tokens behind `token`, each after the last, int64 [count].

        All but the last are in the cache afterwards. Nothing waits for the GPU. None where `run`
        would give False.
        """
        if not 0 <= token < self._parts.vocabulary or not self._ready(cache, count):
            return None
        found = torch.empty(count, dtype=torch.int64, device=self.device)
        self._token.fill_(token)
        self._position.fill_(cache.layers[0].length)
        for place in found:
            self._launch()
            torch.argmax(self._logits[0], out=place)
            self._token.copy_(place)
            self._position.add_(1)
        if not self._valid():
            return None
        for layer in cache.layers:
            layer.length += count
        return found

    @property
    def captured(self) -> bool:
        """Whether tokens run as a graph, since the first one of a cache."""
        return self._graph is not None

    def outdated(self) -> bool:
        """Whether a code was replaced since, or `run` found another change: make a new step."""
        if self._changes != CodedWeight.changes:
            self._stale = self._stale or not self._parts.same_codes()
            self._changes = CodedWeight.changes
        return self._stale

    def _valid(self) -> bool:
        """Whether the model is what was described; looked at while the GPU works."""
        self._stale = self._stale or not self._parts.current()
        return not self._stale and not self._parts.hooked()

    def _ready(self, cache: Any, more: int) -> bool:
        """Make the step one of this cache, with room for `more` tokens behind what it holds."""
        if self._failed or self.outdated() or type(cache) is not DenseCache:
            return False
        layers = cache.layers
        if len(layers) != len(self._parts.blocks):
            return False
        if not cache.takes(more):
            return False
        places = [side.data_ptr() for layer in layers for side in (layer.keys, layer.values)]
        held = (layers[0].keys.shape, layers[0].keys.dtype, places)
        return held == self._held or self._bind(layers, held)

    def _bind(self, layers: list[DenseLayer], held: tuple[Any, ...]) -> bool:
        """Point the step at a cache, and capture it where there are graphs."""
        self._graph, self._held = None, None
        parts, capacity = self._parts, layers[0].capacity
        shape, dtype, _ = held
        if shape != (1, parts.kv_heads, capacity, parts.head_dim) or dtype not in _FLOATS:
            return False
        self._storage = [(layer.keys, layer.values) for layer in layers]
        for side in (side for pair in self._storage for side in pair):
            if (side.shape, side.dtype, side.device) != (shape, dtype, self.device):
                return False
            if not side.is_contiguous():
                return False
        self._heads = kernels.Heads.make(
            parts.heads, parts.kv_heads, parts.head_dim, capacity, parts.epsilon,
            parts.score_scale, self.device, self._tile,
        )  # fmt: skip
        self._held = held
        if self.device.type == "cuda":
            self._token.zero_()
            self._position.fill_(layers[0].length)
            self._capture()
            self._storage = []  # the graph has their addresses, and the memory stays the cache's
        return not self._failed

    def _launch(self) -> None:
        if self._graph is not None:
            self._graph.replay()
        else:
            self._run_token(self.early)

    def _capture(self) -> None:
        """A graph of the step: without overlap if that fails, and none, for good, if that does."""
        for early in dict.fromkeys((self.early, False)):
            try:
                self._graph, self.early = self._captured(early), early
                return
            except Exception as error:  # of CUDA, Triton or a kernel that chooses by values
                torch.cuda.synchronize(self.device)
                how = "a CUDA graph whose kernels overlap" if early else "a CUDA graph"
                _LOG.warning("decoding without %s: %s", how, error)
        self._failed = True

    def _captured(self, early: bool) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with aside(self.device) as stream:
            self._run_token(False)
            expected = self._logits.float()
            if early:
                self._run_token(True)  # what is compiled on first use is, before the capture
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self._run_token(early)
            self._logits.zero_()
            graph.replay()
            apart = torch.linalg.vector_norm(self._logits.float() - expected)
            agrees = bool(apart <= _AGREEMENT * torch.linalg.vector_norm(expected))
        if not agrees:
            raise PliantError("its logits differ from those of the same launches outside of it")
        return graph

    def _run_token(self, early: bool) -> None:
        """Logits of the token at the position, whose keys and values go into the cache."""
        parts, heads = self._parts, self._heads
        assert heads is not None
        self._embed(early)
        angles = self._position * parts.frequencies.float()
        torch.cos(angles, out=heads.cosines)
        torch.sin(angles, out=heads.sines)
        if parts.rope_scale != 1:
            heads.cosines.mul_(parts.rope_scale)
            heads.sines.mul_(parts.rope_scale)
        more: Tensor | None = None
        for block, storage in zip(parts.blocks, self._storage, strict=True):
            x = self._norm(more, block.attention_norm, early)
            more = _product(self._attend(block, heads, x, storage, early), block.o)
            x = self._norm(more, block.mlp_norm, early)
            gate, up = _products(x, block.gate, block.up)
            more = _product(kernels.gated(gate, up, self._inner, early), block.down)
        x = self._norm(more, parts.final_norm, early)
        self._logits = _product(x, parts.head)  # of a graph: always the same memory

    def _norm(self, more: Tensor | None, weight: Tensor, early: bool) -> Tensor:
        return kernels.add_norm(
            self._residual, more, weight, self._parts.epsilon, self._normed, early
        )

    def _attend(
        self,
        block: Block,
        heads: kernels.Heads,
        x: Tensor,
        storage: tuple[Tensor, Tensor],
        early: bool,
    ) -> Tensor:
        q, k, v = (block.q, block.k, block.v)
        biases = norms = None
        if q.bias is not None and k.bias is not None and v.bias is not None:
            biases = (q.bias, k.bias, v.bias)  # added on the way
            q, k, v = (Product(product.weight, None) for product in (q, k, v))
        if block.query_norm is not None and block.key_norm is not None:
            norms = (block.query_norm, block.key_norm)
        query, key, value = _products(x, q, k, v)
        return kernels.attend(
            heads, (query, key, value), biases, norms, self._position, *storage, self._mixed, early
        )

    def _embed(self, early: bool) -> None:
        """The residual becomes the token's row, straight from its code where a kernel knows it."""
        code = self._parts.embedding.code
        leaves = _leaves(code)
        if not all(type(leaf) in (GroupInt, GroupLevels) for leaf in leaves):
            self._residual.copy_(code.rows(self._token, self.dtype))
            return
        first = 0
        for leaf in leaves:
            assert isinstance(leaf, GroupInt | GroupLevels)
            kernels.embed(self._token, leaf, first, self._residual, early)
            first += leaf.shape[0]


def _products(x: Tensor, *products: Product) -> list[Tensor]:
    """Products that share x; codes of one form share a launch, too."""
    found = matmul_each(x, [product.code for product in products])
    for y, product in zip(found, products, strict=True):
        if product.bias is not None:
            y += product.bias
    return found


def _product(x: Tensor, product: Product) -> Tensor:
    return _products(x, product)[0]


def _leaves(code: Code) -> list[Code]:
    if isinstance(code, RowStack):
        return [leaf for part in code.parts for leaf in _leaves(part)]
    return [code]
