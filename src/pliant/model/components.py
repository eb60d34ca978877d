"""Every component's result rounded while a model runs: multiplies, norms, softmax, activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

Rounding = Callable[[Tensor], Tensor]
_SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)


@contextmanager
def rounded_components(model: Any, rounding: Rounding, *, nonlinear: bool = True) -> Iterator[None]:
    """Inside, `rounding` is applied to the results of a transformers model's components.

    Embeddings and linear layers but the head; with `nonlinear` also norms, activation functions
    and the softmax of attention, which is computed unfused for that. Elementwise sums and products
    (residuals, gates) stay. Source: Blockwise Compression of Transformer-based Models without
    Retraining.
    """
    head = model.get_output_embeddings()
    attention = model.config._attn_implementation
    hooks = []
    try:
        for module in model.modules():
            linear = isinstance(module, nn.Linear | Conv1D | nn.Embedding) and module is not head
            if linear or (nonlinear and _is_nonlinear(module)):
                hooks.append(module.register_forward_hook(lambda m, args, out: rounding(out)))
        if not nonlinear:
            yield
            return
        model.set_attn_implementation("eager")
        with _Softmax(rounding):
            yield
    finally:
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation(attention)


def _is_nonlinear(module: nn.Module) -> bool:
    kind = type(module)
    activation = kind.__module__ in ("transformers.activations", "torch.nn.modules.activation")
    return activation or kind.__name__.endswith("Norm")


class _Softmax(TorchFunctionMode):
    """Rounds what softmax gives."""

    def __init__(self, rounding: Rounding) -> None:
        super().__init__()
        self._rounding = rounding

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        return self._rounding(result) if function in _SOFTMAX else result
