"""The KL divergence of two sets of logits and its gradient, each logit read twice, none kept."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pliant.kernels.streams import launched_on

_BLOCK = 2048  # logits of a row at a time


@triton.jit  # type: ignore[untyped-decorator]
def _grown(highest, total, x):  # type: ignore[no-untyped-def]
    """The running maximum and the running sum of exp(. - maximum) with x taken in."""
    higher = tl.maximum(highest, tl.max(x, axis=0))
    return higher, total * tl.exp(highest - higher) + tl.sum(tl.exp(x - higher), axis=0)


@triton.jit  # type: ignore[untyped-decorator]
def _divergence(  # type: ignore[no-untyped-def]
    own, original, loss, gradient, width, share, BLOCK: tl.constexpr
):
    """One row: its divergence, and `share` of the gradient of that by own logits."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    own_high, their_high, own_sum, their_sum = -1e30, -1e30, 0.0, 0.0
    for start in range(0, width, BLOCK):
        here, inside = row * width + start + place, start + place < width
        ours = tl.load(own + here, mask=inside, other=-1e30).to(tl.float32)
        theirs = tl.load(original + here, mask=inside, other=-1e30).to(tl.float32)
        own_high, own_sum = _grown(own_high, own_sum, ours)
        their_high, their_sum = _grown(their_high, their_sum, theirs)
    own_log, their_log = own_high + tl.log(own_sum), their_high + tl.log(their_sum)
    total = 0.0
    for start in range(0, width, BLOCK):
        here, inside = row * width + start + place, start + place < width
        ours = tl.load(own + here, mask=inside, other=-1e30).to(tl.float32) - own_log
        theirs = tl.load(original + here, mask=inside, other=-1e30).to(tl.float32) - their_log
        likely = tl.exp(theirs)
        total += tl.sum(tl.where(inside, likely * (theirs - ours), 0.0), axis=0)
        tl.store(gradient + here, (tl.exp(ours) - likely) * share, mask=inside)
    tl.store(loss + row, total)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, original: Tensor) -> Tensor:
        own, original = own.contiguous(), original.contiguous()
        width = own.shape[-1]
        rows = own.numel() // width
        loss = torch.empty(rows, device=own.device)
        gradient = torch.empty_like(own)
        with launched_on(own.device):
            _divergence[(rows,)](own, original, loss, gradient, width, 1.0 / rows, BLOCK=_BLOCK)
        ctx.save_for_backward(gradient)
        return loss.mean()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0].to(gradient.dtype), None


def mean_divergence(own: Tensor, original: Tensor) -> Tensor:
    """Mean over positions of KL(original || own), nats; differentiable in own logits.

    own [..., V], of any float type; original [..., V]. Sums are float32.
    """
    found: Tensor = _Divergence.apply(own, original)  # type: ignore[no-untyped-call]
    return found
