"""What a pass over calibration text leaves behind for one target."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Statistics:
    """Statistics of one target's inputs and of the gradients at its outputs, float32.

    Each field is None unless a chosen method asked for it. x is an input [in], g the gradient
    of a sequence's log-likelihood at the output [out] for the same token. Where sequences are
    weighted, each mean counts a token as often as its sequence's weight says; weights have mean 1.
    """

    tokens: int = 0
    second_moment: Tensor | None = None  # [in, in] mean of x x^T, tokens weighted by |g|^2
    input_max: Tensor | None = None  # [in] largest |x|
    output_max: Tensor | None = None  # [out] largest |W x|
    fisher: Tensor | None = None  # [out, in] mean of (g x)^2: the diagonal Fisher information
    output_moment: Tensor | None = None  # [out] mean of g^2
    inputs: Tensor | None = None  # [n, in] x of some tokens, kept for methods that need "pairs"
    gradients: Tensor | None = None  # [n, out] g of the same tokens

    @property
    def pairs(self) -> tuple[Tensor, Tensor] | None:
        """(inputs, gradients), or None when no token was kept."""
        if self.inputs is None or self.gradients is None or not len(self.inputs):
            return None
        return self.inputs, self.gradients


FIELDS = frozenset({"second_moment", "input_max", "output_max", "fisher", "output_moment"})


class Accumulator:
    """Sums one target's statistics over batches of its (x, y, g)."""

    def __init__(self, needs: frozenset[str], weighted: bool) -> None:
        self._needs = needs
        self._weighted = weighted
        self._tokens = 0
        self._weight: Tensor | None = None  # float64 [], where x is: to read it waits for a GPU
        self._sums: dict[str, Tensor] = {}

    def add(self, x: Tensor, y: Tensor, g: Tensor, share: float = 1.0) -> None:
        """x [n, in], y [n, out], g [n, out]: the gradient at y, by the root of the tokens' weight.

        share: that weight. Every square of g carries it already; a plain mean of x x^T does not.
        """
        self._tokens += len(x)
        squared = g.square()
        if "second_moment" in self._needs:
            # Tokens whose output matters to the likelihood count for more: with weights |g|^2
            # the layer's error is the loss's second-order change under a block-diagonal Fisher.
            plain = x.new_full((len(x), 1), share)
            weight = squared.sum(1, keepdim=True) if self._weighted else plain
            total = weight.sum().double()
            self._weight = total if self._weight is None else self._weight + total
            self._add_product("second_moment", x * weight, x)
        if "fisher" in self._needs:
            self._add_product("fisher", squared, x.square())
        if "output_moment" in self._needs:
            self._add("output_moment", squared.sum(0))
        if "input_max" in self._needs:
            self._raise("input_max", x.abs().amax(0))
        if "output_max" in self._needs:
            self._raise("output_max", y.abs().amax(0))

    def result(self) -> Statistics:
        """The means; an accumulator that saw no token gives empty statistics."""
        if not self._tokens:
            return Statistics()
        for name in ("fisher", "output_moment"):
            if name in self._sums:
                self._sums[name].div_(self._tokens)
        if "second_moment" in self._sums:
            assert self._weight is not None
            self._sums["second_moment"].div_(self._weight.clamp_min(1e-30))
        return Statistics(tokens=self._tokens, **self._sums)

    def _add(self, name: str, value: Tensor) -> None:
        if name in self._sums:
            self._sums[name].add_(value)
        else:
            self._sums[name] = value

    def _add_product(self, name: str, left: Tensor, right: Tensor) -> None:
        """Add left^T right in place: the sum is as large as a weight, and is held once."""
        if name not in self._sums:
            self._sums[name] = left.new_zeros(left.shape[1], right.shape[1])
        self._sums[name].addmm_(left.t(), right)

    def _raise(self, name: str, value: Tensor) -> None:
        known = self._sums.get(name)
        self._sums[name] = value if known is None else torch.maximum(known, value)
