"""LLM.int8(): 8-bit rows, and the input channels of outliers in 16 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from pliant.codes import Code, ColumnStack, Dense, GroupInt, Permuted, quantize_scales
from pliant.errors import PliantError
from pliant.methods.catalog import method
from pliant.observe.statistics import Statistics


@method(
    "llm_int8",
    kind="quantize",
    paper="LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale",
    needs=("input_max",),
)
def llm_int8(
    weight: Tensor,  # [out, in]
    statistics: Statistics,
    *,
    bits: int = 8,
    threshold: float = 6.0,
) -> Code:
    """Vector-wise int8 (one absmax scale a row); inputs that exceed `threshold` stay in fp16.

    An input channel is an outlier when its largest |x| passes `threshold`; its weights are kept
    exactly and do not widen the row's scale. The channels are reordered so that both parts are
    dense and no byte is spent on a position: Permuted(ColumnStack(Dense, GroupInt)), 2 bytes an
    input for the order. This stores weights; rounding activations to int8 is the cache's and the
    kernels' affair. Cost: one pass. Source: Dettmers et al. 2022.
    """
    if statistics.input_max is None:
        raise PliantError("llm_int8 needs the largest |x| of each input; observe it first")
    if not 2 <= bits <= 8:
        raise PliantError(f"llm_int8 takes bits of 2 to 8, not {bits}")
    outlier = statistics.input_max > threshold
    count = int(outlier.sum())
    if not count:
        return _vector_wise(weight, bits)
    if count == weight.shape[1]:
        return Dense(_half(weight))
    order = torch.argsort(outlier.to(torch.uint8), descending=True, stable=True)
    kept = Dense(_half(weight[:, order[:count]]))
    return Permuted.by(ColumnStack((kept, _vector_wise(weight[:, order[count:]], bits))), order)


def _vector_wise(weight: Tensor, bits: int) -> GroupInt:
    """Symmetric integers with one scale a row."""
    w = weight.float()
    top = 2 ** (bits - 1) - 1
    stored = quantize_scales(w.abs().amax(1, keepdim=True) / top)
    scale = stored.scales_as()
    q = torch.where(scale > 0, w / scale, 0.0).round().clamp(-top - 1, top) + (top + 1)
    return GroupInt.pack(q.to(torch.uint8), stored, None, bits, 0)


def _half(weight: Tensor) -> Tensor:
    return weight.float().clamp(-65504, 65504).half()
