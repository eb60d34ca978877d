"""Objects that stand where a module expects its weight, and hold it in another form.

nn.Linear, Conv1D, embeddings of every kind and loops over experts hand their weight to a torch
function; through `__torch_function__` a stand-in answers that call itself. So transformers' own
modules run unchanged on weights that never exist as one dense float tensor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_TILE_BYTES = 1 << 24
TAG = "_pliant_targets"  # attribute of a weight: its targets, and whether it is given as [in, out]


class WeightStandIn(nn.Module, ABC):
    """A weight whose canonical form is [out, in]; `transposed` says the module expects [in, out].

    dtype: what the module is told that its weight's dtype is, and that decoded values have.
    """

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, transposed: bool) -> None:
        super().__init__()
        self.canonical = shape
        self.dtype = dtype
        self.transposed = transposed

    @abstractmethod
    def multiply(self, x: Tensor) -> Tensor:
        """x [..., in] times the transposed weight: [..., out], in x's dtype."""

    @abstractmethod
    def multiply_rows(self, x: Tensor, start: int, stop: int) -> Tensor:
        """`multiply` by the rows [start, stop) alone: [..., stop - start]."""

    @abstractmethod
    def gather(self, index: Tensor) -> Tensor:
        """Rows [n, in] at `index` [n]."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The whole weight [out, in]; only for torch functions that nothing better answers."""

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @property
    def T(self) -> WeightStandIn:
        """This weight as modules that multiply by `weight.T` use it."""
        return _Transposed(self)

    def t(self) -> WeightStandIn:
        return _Transposed(self)

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.canonical[::-1] if self.transposed else self.canonical)

    @property
    def ndim(self) -> int:
        return 2

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return 2

    def numel(self) -> int:
        return self.canonical[0] * self.canonical[1]

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        product = as_product(function, args, kwargs)
        if product is not None and isinstance(product.weight, WeightStandIn):
            weight = product.weight
            if weight.transposed == product.transposed and not isinstance(product.x, cls):
                y = weight.multiply(product.x)
                return y if product.bias is None else y + product.bias
        if function is F.embedding:
            index = args[0] if args else kwargs["input"]
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            if not weight.transposed:
                return weight.gather(index.reshape(-1)).view(*index.shape, -1)

        def densify(value: Any) -> Any:
            if isinstance(value, WeightStandIn):
                return value.dense().t() if value.transposed else value.dense()
            return value

        return function(
            *(densify(value) for value in args),
            **{name: densify(value) for name, value in kwargs.items()},
        )


class Product:
    """A torch call understood as x W^T + bias. transposed: the call gave W as [in, out]."""

    __slots__ = ("bias", "transposed", "weight", "x")

    def __init__(self, x: Any, weight: Any, bias: Any, transposed: bool) -> None:
        self.x, self.weight, self.bias, self.transposed = x, weight, bias, transposed


_MATMULS = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)


def as_product(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Product | None:
    """The multiply that `function(*args, **kwargs)` does by a weight, None when it is no such."""
    if function is F.linear:
        x, weight, bias = (
            args[i] if len(args) > i else kwargs.get(name)
            for i, name in enumerate(("input", "weight", "bias"))
        )
        return Product(x, weight, bias, False)
    if function is torch.addmm and len(args) == 3 and not kwargs:
        return Product(args[1], args[2], args[0], True)
    if function in _MATMULS and len(args) == 2 and not kwargs:
        return Product(args[0], args[1], None, True)
    return None


class _Transposed(WeightStandIn):
    """The other orientation of a stand-in."""

    def __init__(self, inner: WeightStandIn) -> None:
        super().__init__(inner.canonical, inner.dtype, not inner.transposed)
        self.inner = inner
        noted = getattr(inner, TAG, None)
        if noted is not None:
            setattr(self, TAG, (noted[0], not noted[1]))

    @property
    def device(self) -> torch.device:
        return self.inner.device

    def multiply(self, x: Tensor) -> Tensor:
        return self.inner.multiply(x)

    def multiply_rows(self, x: Tensor, start: int, stop: int) -> Tensor:
        return self.inner.multiply_rows(x, start, stop)

    def gather(self, index: Tensor) -> Tensor:
        return self.inner.gather(index)

    def dense(self) -> Tensor:
        return self.inner.dense()


class StoredWeight(WeightStandIn):
    """A resident weight kept in the checkpoint's dtype and computed with in another."""

    def __init__(self, tensor: Tensor, dtype: torch.dtype) -> None:
        super().__init__((tensor.shape[0], tensor.shape[1]), dtype, transposed=False)
        self.tensor = tensor

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def multiply(self, x: Tensor) -> Tensor:
        return _tiled_linear(x, self.tensor)

    def multiply_rows(self, x: Tensor, start: int, stop: int) -> Tensor:
        return _tiled_linear(x, self.tensor[start:stop])

    def gather(self, index: Tensor) -> Tensor:
        return self.tensor[index].to(self.dtype)

    def dense(self) -> Tensor:
        return self.tensor.to(self.dtype)


def _tiled_linear(x: Tensor, weight: Tensor) -> Tensor:
    out: Tensor = _TiledLinear.apply(x, weight)  # type: ignore[no-untyped-call]
    return out


class _TiledLinear(torch.autograd.Function):
    """F.linear that widens the weight to x's dtype a tile of rows at a time, twice if asked."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        out = x.new_empty(*x.shape[:-1], weight.shape[0])
        for start, stop in _tiles(weight, x.dtype):
            out[..., start:stop] = F.linear(x, weight[start:stop].to(x.dtype))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient, weight = gradients[0], ctx.weight
        out = gradient.new_zeros(*gradient.shape[:-1], weight.shape[1])
        for start, stop in _tiles(weight, gradient.dtype):
            out += gradient[..., start:stop] @ weight[start:stop].to(gradient.dtype)
        return out, None


def _tiles(weight: Tensor, dtype: torch.dtype) -> list[tuple[int, int]]:
    rows = max(1, _TILE_BYTES // (weight.shape[1] * dtype.itemsize))
    return [
        (start, min(start + rows, weight.shape[0])) for start in range(0, weight.shape[0], rows)
    ]
