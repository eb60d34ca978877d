"""Grids of shared levels: small floats, powers of two and the like, fitted group by group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from pliant.codes import GroupLevels, GroupScales, PowerScales, power_scales, quantize_scales
from pliant.errors import PliantError
from pliant.kernels.rounding import level_search
from pliant.methods.grid import clip_shares, tile_rows
from pliant.observe.statistics import Statistics

Scaling = Literal["free", "power", "ratio"]

_ANCHORS = 4  # factors of a row that are tried within an octave
TINY = 1e-8  # the least scale that is tried


@dataclass(frozen=True, eq=False)
class LevelGrid:
    """`w = tables[selector, index] * scale` for every group of `group_size` input channels.

    tables: rising levels [tables, 2**bits] float32, exact in fp16. scales: as they will be
    stored, [out, groups] float32. selector: [out, groups] int64, None with one table. loss: the
    weighted squared error of rounding to this grid, before scales were stored; float32 [].
    """

    bits: int
    group_size: int
    tables: Tensor
    stored: GroupScales | PowerScales
    scales: Tensor
    selector: Tensor | None
    loss: Tensor

    def pack(self, index: Tensor) -> GroupLevels:
        """The code of `index` [out, in] uint8 on this grid."""
        return GroupLevels.pack(
            index, self.stored, self.tables, self.selector, self.bits, self.group_size, check=False
        )

    def round(self, weight: Tensor) -> GroupLevels:
        """The code of `weight` [out, in], each value at its nearest level."""
        out, width = weight.shape
        index = torch.empty(out, width, dtype=torch.uint8, device=weight.device)
        step = tile_rows(weight, width)
        for start in range(0, out, step):
            rows = slice(start, start + step)
            columns = self.columns(rows)
            tile = weight[rows].float().t().contiguous()
            for group in range(self.scales.shape[1]):
                members = slice(group * self.group_size, (group + 1) * self.group_size)
                index[rows, members] = columns.nearest(tile[members], group)[0].t()
        return self.pack(index)

    def columns(self, rows: slice) -> Columns:
        """What rounding needs of some rows, laid out for one input channel after another."""
        selector = None if self.selector is None else self.selector[rows].t().contiguous()
        return Columns(self.tables, self.scales[rows].t().contiguous(), selector)


class Columns:
    """The grid of a tile of rows: scales [groups, rows], selector [groups, rows] or None."""

    def __init__(self, tables: Tensor, scales: Tensor, selector: Tensor | None) -> None:
        self._levels = tables.contiguous()
        self._middles = (tables[:, 1:] + tables[:, :-1]) / 2
        self._scales, self._selector = scales, selector
        self._inverses = 1.0 / scales.clamp_min(1e-30)

    def nearest(self, columns: Tensor, group: int) -> tuple[Tensor, Tensor]:
        """(index uint8, value) of the level next to each of `columns` [..., rows] of one group."""
        x = columns * self._inverses[group]
        if self._selector is None:
            index = torch.bucketize(x, self._middles[0])
            values = self._levels[0][index]
        else:
            table = self._selector[group]
            bounds = self._middles[table].expand(*x.shape, -1)
            index = torch.searchsorted(bounds.contiguous(), x[..., None])[..., 0]
            values = self._levels[table.expand_as(index), index]
        return index.to(torch.uint8), values * self._scales[group]


def fit_levels(
    weight: Tensor,  # [out, in]
    tables: Tensor,  # [tables, 2**bits] rising, with levels on both sides of zero
    group_size: int,
    *,
    importance: Tensor | None = None,  # [in], weight of each input channel's squared error
    clip: bool = True,
    scaling: Scaling = "free",
    scale_bits: int = 16,
) -> LevelGrid:
    """The scale, and of several tables the best one, of each group, by weighted squared error.

    group_size 0 means one group a row. `clip` also tries scales that saturate. scaling "free"
    stores scales in `scale_bits` as `quantize_scales` does; "power" as powers of two and "ratio"
    as powers of two times a factor of the row, their exponents in `scale_bits` of 1 to 8.
    """
    out, width = weight.shape
    bits = (tables.shape[1] - 1).bit_length()
    if scaling not in ("free", "power", "ratio"):
        raise PliantError(f"scaling must be free, power or ratio, not {scaling!r}")
    tables = stored_tables(tables).to(weight.device)
    size = max(width, 1) if group_size <= 0 else min(group_size, width)
    extra = -width % size
    if importance is None:
        importance = torch.ones(width, device=weight.device)
    search = level_search(weight.device, size) if scaling == "free" else None
    stored: GroupScales | PowerScales
    if search is not None:
        losses, scales, selector = search(
            weight, tables, importance, size, clip_shares(bits, clip), TINY
        )
        stored = quantize_scales(scales, scale_bits, check=False)
        return _grid(bits, size, tables, stored, selector, losses.sum())
    importance = pad(importance.float(), (0, extra)).view(1, -1, size)
    shape = out, (width + extra) // size
    scales = torch.empty(shape, device=weight.device)
    selector = torch.zeros(shape, dtype=torch.int64, device=weight.device)
    factors = torch.ones(out, device=weight.device)
    loss = torch.zeros((), device=weight.device)
    step = tile_rows(weight, width + extra)
    for start in range(0, out, step):
        rows = slice(start, start + step)
        tile = weight[rows].float()
        # Edge padding repeats a real value, so that a ragged group's range is its own.
        tile = torch.cat([tile, tile[:, -1:].expand(-1, extra)], 1) if extra else tile
        groups = tile.view(tile.shape[0], -1, size)
        found, scales[rows], selector[rows] = _search(groups, tables, importance, bits, clip)
        if scaling != "free":
            picked = tables[selector[rows]]
            found, scales[rows], factors[rows] = _to_powers(
                groups, picked, importance, scales[rows], clip, scaling == "ratio"
            )
        loss += found.sum()
    if scaling == "free":
        stored = quantize_scales(scales, scale_bits)
    else:
        exponents = torch.log2(scales / factors[:, None]).round()
        stored = power_scales(exponents, scale_bits, factors if scaling == "ratio" else None)
    return _grid(bits, size, tables, stored, selector, loss)


def _grid(
    bits: int, size: int, tables: Tensor, stored: GroupScales | PowerScales, selector: Tensor,
    loss: Tensor,
) -> LevelGrid:  # fmt: skip
    chosen = selector if len(tables) > 1 else None
    return LevelGrid(bits, size, tables, stored, stored.scales_as(), chosen, loss)


def stored_tables(tables: Tensor) -> Tensor:
    """Levels as they are stored: what is nearest must be nearest after decoding, too."""
    return tables.half().float().sort(1).values


def byte_tables(tables: Tensor) -> Tensor:
    """Rising levels scaled and rounded to integers of at most 127 in magnitude, over 128.

    For tables that are free to choose their unit, since groups' scales make up for it. Exact in
    fp16, and a kernel multiplies such a level as one 8-bit integer. Levels stay on both sides of
    zero, and those of either half of a table within 127 units of each other.
    """
    whole = (byte_scaled(tables) * 128).round()
    whole[:, 0].clamp_(max=-1)
    whole[:, -1].clamp_(min=1)
    return whole / 128


def byte_scaled(tables: Tensor) -> Tensor:
    """Tables [tables, levels] times what `byte_tables` scales each with."""
    halves = tables.reshape(len(tables), 2, -1)
    apart = (halves[..., -1] - halves[..., 0]).amax(1, keepdim=True) * (127 / 126)  # and rounding
    reach = torch.maximum(tables.abs().amax(1, keepdim=True), apart)
    return tables * (127 / 128 / reach.clamp_min(TINY))


def _search(
    groups: Tensor, tables: Tensor, importance: Tensor, bits: int, clip: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, scale, table), each [rows, groups], of one tile [rows, groups, size]."""
    low, high = groups.amin(-1), groups.amax(-1)
    best_loss = torch.full_like(low, torch.inf)
    best_scale, best_table = torch.zeros_like(low), torch.zeros_like(low, dtype=torch.int64)
    for number, table in enumerate(tables):
        whole = torch.maximum(high / table[-1], low / table[0]).clamp_min(TINY)
        for share in clip_shares(bits, clip):
            scale = whole * share
            loss = _loss(groups, scale, table, importance)
            better = loss < best_loss
            best_loss = torch.where(better, loss, best_loss)
            best_scale = torch.where(better, scale, best_scale)
            best_table.masked_fill_(better, number)
    return best_loss, best_scale, best_table


def _to_powers(
    groups: Tensor, tables: Tensor, importance: Tensor, scales: Tensor, clip: bool, ratio: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [rows, groups], scale [rows, groups], factor [rows]): scale / factor powers of two.

    Of the two powers around a free scale the better one; without `clip` the one above. Of the
    factors, within the octave below the row's largest free scale, the one of least loss.
    """
    best: tuple[Tensor, Tensor, Tensor] | None = None
    largest = scales.amax(1)
    for anchor in range(_ANCHORS if ratio else 1):
        factor = torch.ones_like(largest)
        if ratio:  # as fp16 will have it, so that the powers fit the factor that is stored
            factor = (largest * 2.0 ** (-anchor / _ANCHORS)).half().float().clamp_min(2.0**-24)
        exact = torch.log2(scales / factor[:, None])
        loss, scale = _nearer_power(groups, tables, importance, exact, factor, clip)
        if best is None:
            best = loss, scale, factor
            continue
        better = loss.sum(1) < best[0].sum(1)
        best = (
            torch.where(better[:, None], loss, best[0]),
            torch.where(better[:, None], scale, best[1]),
            torch.where(better, factor, best[2]),
        )
    assert best is not None
    return best


def _nearer_power(
    groups: Tensor, tables: Tensor, importance: Tensor, exact: Tensor, factor: Tensor, clip: bool
) -> tuple[Tensor, Tensor]:
    above = torch.exp2((exact - 1e-4).ceil()) * factor[:, None]
    loss = _loss(groups, above, tables, importance)
    if not clip:
        return loss, above
    below = above / 2
    other = _loss(groups, below, tables, importance)
    return torch.minimum(loss, other), torch.where(other < loss, below, above)


def _loss(groups: Tensor, scale: Tensor, tables: Tensor, importance: Tensor) -> Tensor:
    """Weighted squared error [rows, groups]; tables [levels], or [rows, groups, levels]."""
    x = groups / scale[..., None]
    middles = (tables[..., 1:] + tables[..., :-1]) / 2
    if tables.dim() == 1:
        near = tables[torch.bucketize(x, middles)]
    else:
        near = tables.gather(-1, torch.searchsorted(middles.contiguous(), x))
    return near.sub_(x).mul_(scale[..., None]).square_().mul_(importance).sum(-1)


def channel_importance(statistics: Statistics) -> Tensor | None:
    """Mean square of each input [in], when the second moment is known."""
    moment = statistics.second_moment
    return None if moment is None else moment.diagonal()


def integer_levels(bits: int) -> Tensor:
    """[2**bits] rising integers in sign and magnitude, so zero is there twice."""
    top = 2 ** (bits - 1) - 1
    return torch.cat([torch.arange(-top, 1), torch.arange(top + 1)]).float()


def minifloat_levels(exponent: int, mantissa: int) -> Tensor:
    """[2**(1 + exponent + mantissa)] rising values of a float whose every pattern is a number.

    With E = 2**(exponent - 1) - 1 a pattern (s, e, m) is (-1)^s 2^(e - E) (1 + m / 2^mantissa),
    and (-1)^s 2^(1 - E) m / 2^mantissa for e = 0; zero is there twice. A power of two, which any
    scale makes up for, brings the largest value to 4 .. 8 if fp16 can hold the smallest one then.
    """
    if not 1 <= exponent <= 5 or mantissa < 0 or exponent + mantissa > 7:
        raise PliantError(
            f"a minifloat has 1 to 5 exponent bits and 8 bits in all, not E{exponent}M{mantissa}"
        )
    e = torch.arange(2**exponent, dtype=torch.float64)[:, None]
    m = torch.arange(2**mantissa, dtype=torch.float64) / 2**mantissa
    values = torch.where(e == 0, 2.0 * m, torch.exp2(e) * (1 + m)).flatten()
    smallest = 1 - mantissa if mantissa else 1  # exponent of the least positive value
    values = values * 2.0 ** max(3 - 2**exponent, -24 - smallest)
    return torch.cat([-values.flip(0), values]).float()
