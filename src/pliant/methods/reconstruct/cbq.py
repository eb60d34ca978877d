"""CBQ: reconstruct windows of layers, rounding corrected by a product of two thin matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from pliant.codes import Code, GroupInt
from pliant.errors import PliantError
from pliant.methods.catalog import method
from pliant.methods.grid import fit_grid
from pliant.methods.latent import LatentInt
from pliant.methods.window import Window, decoded, token_error


@method(
    "cbq",
    kind="reconstruct",
    paper="CBQ: Cross-Block Quantization for Large Language Models",
)
def cbq(
    window: Window,
    codes: Mapping[str, Code],
    *,
    rank: int = 5,
    steps: int = 100,
    batch: int = 4,
    rate: float = 1e-2,
    scale_rate: float = 2e-3,
    homologous: float = 0.5,
    truncate: bool = True,
    seed: int = 0,
) -> dict[str, Code]:
    """Group integers and scales that bring a window's outputs to the original's, bytes unchanged.

    Each weight's place on its grid moves by at most half a step, h(A B) with A [out, rank],
    B [rank, in] and h the rectified sigmoid of AdaRound, less 1/2; A, B and scales follow the
    gradient of `token_error`. The target mixes the original's outputs with the original weights'
    outputs on the compressed model's inputs, `homologous` of the latter: for squared errors
    that is the paper's sum of two losses. `truncate` tries, for each weight, a grid without its
    outliers (`truncation`) and keeps it where the window gets closer.

    Codes that are no `GroupInt` stay and take part as they are. What is worse than the start on
    the window's own text is not returned. Against the paper: rounding passes gradients straight
    through, without its annealed penalty and its KL term, and activations are not scaled.
    Cost: `steps` passes back and forth over `batch` sequences. Source: Ding et al. 2023.
    """
    if not 0 <= homologous <= 1 or rank < 1 or batch < 1 or steps < 0:
        raise PliantError("cbq takes 0 <= homologous <= 1, and a rank and a batch of at least 1")
    start = {n: code.to(window.device) for n, code in codes.items()}
    wanted = _targets(window, homologous, batch)
    if truncate:
        start = _truncated(window, start, batch, wanted)
    fixed = decoded(start, window.device)
    generator = torch.Generator().manual_seed(seed)
    latents = {
        name: LowRankRounding(code, window.weights[name], rank, generator)
        for name, code in start.items()
        if isinstance(code, GroupInt)
    }
    before = window.error(fixed, batch, wanted)
    if not latents or not steps:
        return start
    optimizer = torch.optim.Adam(
        [
            {
                "params": [p for latent in latents.values() for p in (latent.a, latent.b)],
                "of": rate,
            },
            {"params": [latent.log_scale for latent in latents.values()], "of": scale_rate},
        ],
        lr=0.0,
    )
    order = torch.randperm(len(window.inputs), generator=generator)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["of"] * 0.5 * (1 + math.cos(math.pi * step / steps))
        begin = step * batch % len(order)
        rows = torch.cat([order, order])[begin : begin + min(batch, len(order))]
        weights = fixed | {name: latent.weight() for name, latent in latents.items()}
        found = window.run(weights, window.inputs[rows].to(window.device))
        loss = token_error(found, wanted[rows].to(window.device)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    made = start | {name: latent.encode() for name, latent in latents.items()}
    after = window.error(decoded(made, window.device), batch, wanted)
    return made if after < before else start


class LowRankRounding(LatentInt):
    """A `LatentInt` whose places move together: h(A B) away from where they start."""

    def __init__(
        self, code: GroupInt, weight: Tensor, rank: int, generator: torch.Generator
    ) -> None:
        super().__init__(code, weight)
        out, width = code.shape
        self.start = self.position.detach()
        a = torch.randn(out, rank, generator=generator) / rank**0.5
        self.a = a.to(weight.device).requires_grad_(True)
        self.b = torch.zeros(rank, width, device=weight.device, requires_grad=True)

    def weight(self) -> Tensor:
        self.position = self.start + self._offset()
        return super().weight()

    @torch.no_grad()
    def encode(self) -> GroupInt:
        self.position = self.start + self._offset()
        return super().encode()

    def _offset(self) -> Tensor:
        """h(A B) in -1/2 .. 1/2, zero at the start."""
        return self._grouped((1.2 * torch.sigmoid(self.a @ self.b) - 0.1).clamp(0, 1) - 0.5)


def truncation(weight: Tensor, coarse: float = 1.5, fine: float = 1.0) -> float:
    """The largest |w| to keep: outliers are found coarse by quartiles, then fine by variance.

    Coarse: beyond the third quartile by `coarse` interquartile ranges. Fine: among those, the cut
    with the largest squared gap to what is kept less `fine` times the variance of what is kept.
    """
    magnitude = weight.abs().flatten().float()
    count = magnitude.numel()
    ordered = magnitude.sort().values
    low, high = ordered[count // 4], ordered[3 * count // 4]
    first = int(torch.searchsorted(ordered, high + coarse * (high - low)))
    if first >= count or first == 0:
        return float(ordered[-1])
    kept = ordered.double()
    mean = kept.cumsum(0) / torch.arange(1, count + 1, device=kept.device)
    square = kept.square().cumsum(0) / torch.arange(1, count + 1, device=kept.device)
    cuts = torch.arange(first, count, device=kept.device)  # the first value that is cut off
    gap = (kept[cuts] - kept[cuts - 1]).square()
    variance = square[cuts - 1] - mean[cuts - 1].square()
    return float(ordered[int(cuts[int((gap - fine * variance).argmax())]) - 1])


def _targets(window: Window, homologous: float, batch: int) -> Tensor:
    if not homologous:
        return window.outputs
    wanted = window.outputs.clone()
    for rows, own in window.through(window.weights, batch):
        wanted[rows] += homologous * (own.to(wanted.device, wanted.dtype) - wanted[rows])
    return wanted


def _truncated(
    window: Window, codes: dict[str, Code], batch: int, wanted: Tensor
) -> dict[str, Code]:
    """The codes, each on the grid of its truncated weight where that brings the window closer."""
    weights = decoded(codes, window.device)
    lowest = window.error(weights, batch, wanted)
    chosen = dict(codes)
    for name, code in codes.items():
        if not isinstance(code, GroupInt):
            continue
        original = window.weights[name]
        limit = truncation(original)
        if limit >= float(original.abs().max()):
            continue
        tried = _round_like(code, original.clamp(-limit, limit))
        error = window.error(weights | {name: tried.decode()}, batch, wanted)
        if error < lowest:
            lowest, chosen[name], weights[name] = error, tried, tried.decode()
    return chosen


def _round_like(code: GroupInt, weight: Tensor) -> GroupInt:
    """`weight` to the nearest points of a grid of the same form as the code's."""
    grid = fit_grid(
        weight, code.bit_width, code.group_size,
        symmetric=code.zeros is None, clip=False, scale_bits=code.stored_scales.bits,
    )  # fmt: skip
    group = torch.arange(code.width, device=weight.device) // code.group_size
    q = weight.float() / grid.scales.clamp_min(1e-12)[:, group] + grid.zeros[:, group]
    return grid.pack(q.round_().clamp_(0, grid.top).to(torch.uint8))
