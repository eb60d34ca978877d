"""Watching every multiply by a target's weight while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pliant.model.stand_in import TAG, WeightStandIn, as_product
from pliant.model.target import Target

OnLinear = Callable[[Target, Tensor, Tensor], Tensor | None]


_TRANSPOSES = (Tensor.t, torch.t, Tensor.T.__get__, Tensor.mT.__get__)  # type: ignore[attr-defined]


def tag(weight: Any, targets: Sequence[Target]) -> None:
    """Note on a weight which targets it is (row slices in order, or experts in order)."""
    if targets:
        setattr(weight, TAG, (tuple(targets), targets[0].transposed))


class LinearCalls(TorchFunctionMode):
    """Inside this context every multiply by a tagged weight calls `on_linear(target, x, y)`.

    x [n, in] is the multiply's input, y [n, out] its output, bias included; the model goes on with
    this very y, so a gradient hook on it sees the loss. A tensor that `on_linear` returns replaces
    y. A weight made of row slices makes one call for each.
    """

    def __init__(self, on_linear: OnLinear) -> None:
        super().__init__()
        self._on_linear = on_linear

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if function is Tensor.__getitem__ or function in _TRANSPOSES:
            return _retag(function(*args, **kwargs), function, args)
        product = as_product(function, args, kwargs)
        noted = getattr(product.weight, TAG, None) if product is not None else None
        if product is None or noted is None or noted[1] != product.transposed:
            return function(*args, **kwargs)
        targets: tuple[Target, ...] = noted[0]
        x = product.x.reshape(-1, product.x.shape[-1])
        parts = []
        if len(targets) == 1:
            y = _multiply(x, product.weight, product.transposed)
            parts.append(self._notify(targets[0], x, y, product.bias))
        else:
            whole = product.weight
            for target in targets:
                start, stop = target.rows or (0, target.shape[0])
                bias = None if product.bias is None else product.bias[start:stop]
                if isinstance(whole, WeightStandIn):
                    y = whole.multiply_rows(x, start, stop)
                else:
                    y = F.linear(x, whole[start:stop])
                parts.append(self._notify(target, x, y, bias))
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return y.view(*product.x.shape[:-1], -1)

    def _notify(self, target: Target, x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
        if bias is not None:
            y = y + bias
        replaced = self._on_linear(target, x, y)
        return y if replaced is None else replaced


def _retag(out: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Carry a weight's note over to its transpose, or to one of its experts."""
    noted = getattr(args[0], TAG, None)
    if noted is not None and out.dim() == 2:
        targets, transposed = noted
        if function in _TRANSPOSES:
            setattr(out, TAG, (targets, not transposed))
        elif targets[0].expert is not None:
            setattr(out, TAG, ((targets[int(args[1])],), transposed))
    return out


def _multiply(x: Tensor, weight: Any, transposed: bool) -> Tensor:
    if isinstance(weight, WeightStandIn):
        return weight.multiply(x)
    return x @ weight if transposed else F.linear(x, weight)
