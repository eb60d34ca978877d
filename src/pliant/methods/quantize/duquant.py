"""DuQuant: rotate blocks where outliers are, deal them out evenly, rotate again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pliant.codes import BlockRotated, Code, Permuted, Rotated
from pliant.codes.block_rotated import apply_blocks, turn
from pliant.errors import PliantError
from pliant.methods.catalog import method
from pliant.methods.repair._residual import base_code
from pliant.observe.statistics import Statistics


@method(
    "duquant",
    kind="quantize",
    paper="Rotation and Permutation for Advanced Outlier Management and Efficient Quantization of "
    "LLMs",
    needs=("input_max", "second_moment", "pairs"),
)
def duquant(
    weight: Tensor,  # [out, in]
    statistics: Statistics,
    *,
    base: str = "gptq",
    block: int = 32,
    shared: bool = True,
    steps: int = 64,
    seed: int = 0,
    **options: Any,
) -> Code:
    """The weight in a basis of its inputs without outliers, quantized there by `base`.

    1. Every block of inputs is rotated `steps` times at most, each time so that its largest
    channel is spread evenly over the block; the product with the lowest peaks is kept (their mean
    square over tokens, to which the rounding of a token's activations is proportional).
    2. Channels are dealt to blocks in zigzag by their largest |x|, so that blocks carry alike.
    3. The blocks are rotated once more. Rotating by an orthogonal matrix changes nothing in exact
    arithmetic; activations are as easy to round as weights afterwards.

    `shared` stores one rotation for all blocks (2 block^2 bytes), chosen for their common peak;
    otherwise each has its own (2 block bytes an input). The order takes 2 bytes an input. `base`
    is a quantize method that needs no more than second moment, largest inputs and pairs. Peaks are
    those of the sampled inputs, and of a token that is at each channel's largest where the sample
    missed it. Cost: 2 `steps` products of the sample with the blocks. Source: Lin et al. 2024.
    """
    pairs, moment, largest = statistics.pairs, statistics.second_moment, statistics.input_max
    if pairs is None or moment is None or largest is None:
        raise PliantError("duquant needs sampled inputs and their largest |x|; observe them first")
    if block < 2 or steps < 1:
        raise PliantError("duquant takes blocks of at least 2 and at least one step")
    size = min(block, weight.shape[1])
    x = with_peaks(pairs[0], largest)
    first = rotations(x, size, steps, seed, shared)
    x = apply_blocks(x, *first)
    order = zigzag(x.abs().amax(0), size)
    x = x[:, order]
    second = rotations(x, size, steps, seed + 1, shared)
    x = apply_blocks(x, *second)

    inner = turn(turn(weight.float(), *first)[:, order], *second)
    h = _both_sides(_both_sides(moment, *first)[order][:, order], *second)
    moved = Statistics(
        statistics.tokens, h, x.abs().amax(0),
        inputs=x[: len(pairs[0])], gradients=pairs[1],
    )  # fmt: skip
    code = base_code(inner, moved, base, options)
    return BlockRotated.by(Permuted.by(BlockRotated.by(code, *second), order), *first)


def with_peaks(x: Tensor, largest: Tensor) -> Tensor:
    """The sample [n, in] and one more token, of the largest |x| that the sample lacks."""
    missed = torch.where(largest > 1.001 * x.abs().amax(0), largest, 0.0)
    return torch.cat([x.float(), missed[None]])


def rotations(x: Tensor, size: int, steps: int, seed: int, shared: bool) -> tuple[Tensor, Tensor]:
    """(blocks [n or 1, size, size], tail [r, r]) that lower the blocks' peaks over tokens [n, in].

    fp16, as they will be stored, so that what follows sees the same activations.
    """
    whole = x.shape[1] // size * size
    grouped = x[:, :whole].view(len(x), -1, size).transpose(0, 1)  # [blocks, n, size]
    if shared:
        grouped = grouped.reshape(1, -1, size)
    tail = x[:, whole:][None]
    blocks = _greedy(grouped, steps, seed)
    rest = _greedy(tail, steps, seed)[0] if tail.shape[-1] else x.new_zeros(0, 0)
    return blocks.half(), rest.half()


def _greedy(x: Tensor, steps: int, seed: int) -> Tensor:
    """Rotations [blocks, b, b] of x [blocks, n, b], outlier by outlier, the lowest peaks kept."""
    count, _, size = x.shape
    generator = torch.Generator().manual_seed(seed)
    best = torch.eye(size, device=x.device).expand(count, size, size).contiguous()
    current, lowest = best, x.abs().amax(2).square().mean(1)
    blocks = torch.arange(count, device=x.device)
    for _ in range(steps):
        spread = _spreading(size, generator).to(x.device)
        outlier = x.abs().amax(1).argmax(1)  # the channel whose row of the rotation is even
        rows = torch.arange(size, device=x.device).expand(count, size).clone()
        rows[blocks, outlier] = 0
        rows[:, 0] = outlier
        rotation = spread[rows]
        x, current = x @ rotation, current @ rotation
        peak = x.abs().amax(2).square().mean(1)
        best = torch.where((peak < lowest)[:, None, None], current, best)
        lowest = torch.minimum(lowest, peak)
    return best


def _spreading(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix whose first row has equal magnitudes: all rows, if 2^k x 2^k."""
    signs = (torch.rand(2, size, generator=generator) < 0.5).float().mul_(2).sub_(1)
    if size & (size - 1) == 0:
        hadamard = Rotated.rotate(torch.eye(size), 0)
        turned: Tensor = signs[0][:, None] * hadamard * signs[1]
        return turned
    even = signs[0] / size**0.5
    mirror = even.clone()
    mirror[0] += signs[0, 0]  # reflects the first axis onto `even` or its negative
    reflection = torch.eye(size) - 2 * torch.outer(mirror, mirror) / mirror.square().sum()
    rest = torch.eye(size)
    rest[1:, 1:] = torch.linalg.qr(torch.randn(size - 1, size - 1, generator=generator)).Q
    random: Tensor = rest @ reflection
    return random


def zigzag(peaks: Tensor, size: int) -> Tensor:
    """Order [in] that deals channels by falling peak to blocks 0, 1, .., n, n, .., 1, 0, 0, 1, ..

    What does not fill a block comes last and has the smallest peaks.
    """
    ranked = torch.argsort(peaks, descending=True, stable=True)
    whole = len(peaks) // size * size
    dealt = ranked[:whole].view(size, -1).clone()
    dealt[1::2] = dealt[1::2].flip(1)
    return torch.cat([dealt.t().flatten(), ranked[whole:]])


def _both_sides(moment: Tensor, blocks: Tensor, tail: Tensor) -> Tensor:
    """R^T H R: the second moment of rotated inputs."""
    return apply_blocks(apply_blocks(moment, blocks, tail).t().contiguous(), blocks, tail)
