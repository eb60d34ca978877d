"""Uniform grids for groups of weights: fitted once, shared by every integer method."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pliant.codes.group_int import GroupInt, GroupScales, quantize_scales
from pliant.errors import PliantError
from pliant.kernels.rounding import gpu_search

# Candidates of clipping and the narrowest of them, by bits of an index.
_CLIPS = {
    1: (8, 0.2), 2: (8, 0.45), 3: (8, 0.6), 4: (6, 0.7), 5: (4, 0.7), 6: (3, 0.7), 7: (1, 1.0),
    8: (1, 1.0),
}  # fmt: skip
_TILE = 1 << 19  # elements searched at once
_GPU_TILE = 1 << 25


@dataclass(frozen=True, eq=False)
class Grid:
    """`w = (q - zero) * scale` for every group of `group_size` input channels.

    scales: as they will be stored, [out, groups] float32 after rounding. zeros: [out, groups]
    float32 integers; the middle of the range when symmetric.
    """

    bits: int
    group_size: int
    symmetric: bool
    stored: GroupScales
    scales: Tensor
    zeros: Tensor

    @property
    def top(self) -> int:
        """The largest integer of the grid."""
        return (1 << self.bits) - 1

    def pack(self, integers: Tensor) -> GroupInt:
        """The code of `integers` [out, in] uint8 on this grid."""
        return GroupInt.pack(
            integers,
            self.stored,
            None if self.symmetric else self.zeros.to(torch.uint8),
            self.bits,
            self.group_size,
            check=False,
        )


def fit_grid(
    weight: Tensor,  # [out, in] float32
    bits: int,
    group_size: int,
    *,
    symmetric: bool = False,
    importance: Tensor | None = None,  # [in], weight of each input channel's squared error
    clip: bool = True,
    scale_bits: int = 16,
) -> Grid:
    """The grid of each group, its clipping searched to minimise the weighted squared error.

    group_size 0 means one group a row. Rows are handled in tiles so that the search holds a few
    copies of a tile, not of the weight.
    """
    if bits not in _CLIPS:
        raise PliantError(f"bits must be 1 to 8, not {bits}")
    out, width = weight.shape
    size = width if group_size <= 0 else min(group_size, width)
    pad = -width % size
    if importance is None:
        importance = torch.ones(width, device=weight.device)
    shares = clip_shares(bits, clip)
    search = gpu_search(weight.device, size)
    if search is not None:
        scales, zeros = search.search_grid(weight, bits, symmetric, importance, size, shares)
        stored = quantize_scales(scales, scale_bits, check=False)
        return Grid(bits, group_size, symmetric, stored, stored.scales_as(), zeros)
    importance = torch.nn.functional.pad(importance.float(), (0, pad)).view(1, -1, size)
    scales = torch.empty(out, (width + pad) // size, device=weight.device)
    zeros = torch.empty_like(scales)
    tile = tile_rows(weight, width + pad)
    for start in range(0, out, tile):
        rows = weight[start : start + tile].float()
        # Edge padding repeats a real value, so that a ragged group's range is its own.
        groups = torch.cat([rows, rows[:, -1:].expand(-1, pad)], 1) if pad else rows
        groups = groups.view(rows.shape[0], -1, size)
        s, z = _fit_tile(groups, bits, symmetric, importance, shares)
        scales[start : start + tile], zeros[start : start + tile] = s, z
    stored = quantize_scales(scales, scale_bits)
    return Grid(bits, group_size, symmetric, stored, stored.scales_as(), zeros)


def clip_shares(bits: int, clip: bool) -> list[float]:
    """Ranges or scales to try, as shares of the one that clips nothing."""
    count, floor = _CLIPS.get(bits, (1, 1.0)) if clip else (1, 1.0)
    return [1.0 - step * (1.0 - floor) / max(count - 1, 1) for step in range(count)]


def tile_rows(weight: Tensor, width: int) -> int:
    """Rows of `weight` that are searched at once when each takes `width` elements."""
    return max(1, (_GPU_TILE if weight.is_cuda else _TILE) // max(width, 1))


def _fit_tile(
    groups: Tensor, bits: int, symmetric: bool, importance: Tensor, shares: list[float]
) -> tuple[Tensor, Tensor]:
    """Scales and zeros [rows, groups] of one tile [rows, groups, size]."""
    top = (1 << bits) - 1
    low, high = groups.amin(-1), groups.amax(-1)
    if symmetric:
        peak = torch.maximum(-low, high)
        low, high = -peak, peak
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for shrink in shares:
        scale, zero = _affine(low * shrink, high * shrink, bits, symmetric)
        if len(shares) == 1:
            return scale, zero
        s, z = scale[..., None], zero[..., None]
        error = torch.round(groups / s + z).clamp_(0, top).sub_(z).mul_(s).sub_(groups)
        loss = error.square_().mul_(importance).sum(-1)
        if best is None:
            best = (loss, scale, zero)
        else:
            better = loss < best[0]
            best = (
                torch.where(better, loss, best[0]),
                torch.where(better, scale, best[1]),
                torch.where(better, zero, best[2]),
            )
    assert best is not None
    return best[1], best[2]


def _affine(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    top = (1 << bits) - 1
    if symmetric:
        if bits == 1:  # the two levels are -scale/2 and +scale/2
            return (high - low).clamp_min(1e-8), torch.full_like(low, 0.5)
        middle = float(1 << (bits - 1))
        half = high / (middle - 1)
        return half.clamp_min(1e-8), torch.full_like(low, middle)
    scale = ((high - low) / top).clamp_min(1e-8)
    zero = torch.round(-low / scale).clamp_(0, top)
    return scale, zero
