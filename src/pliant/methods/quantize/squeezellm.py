"""SqueezeLLM: levels where the loss is sensitive, and a few values kept apart."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from pliant.codes import Code, Codebook, Sparse, Sum
from pliant.errors import PliantError
from pliant.methods.catalog import method
from pliant.methods.numerics import kmeans_rows
from pliant.observe.statistics import Statistics


@method(
    "squeezellm",
    kind="quantize",
    paper="SqueezeLLM: Dense-and-Sparse Quantization",
    needs=("fisher",),
)
def squeezellm(
    weight: Tensor,  # [out, in]
    statistics: Statistics,
    *,
    bits: int = 4,
    group_size: int = 0,
    outliers: float = 0.0045,
    sensitive: float = 0.0005,
    iterations: int = 30,
) -> Code:
    """Levels of each row by Fisher-weighted k-means, plus sparse outliers and sensitive values.

    Minimises sum F_ij (W_ij - level)^2, F the diagonal Fisher information. `outliers` is the
    share of values of largest |W| and `sensitive` of largest F W^2 that are kept in fp16; they
    do not pull on the levels. group_size 0 gives each row one codebook of 2**bits fp16 levels.
    Cost: a sort and `iterations` passes over sorted rows. Source: Kim et al. 2023.
    """
    if statistics.fisher is None:
        raise PliantError("squeezellm needs the Fisher information of its weights; observe it")
    if not 0 <= outliers + sensitive < 1 or min(outliers, sensitive) < 0:
        raise PliantError("outliers and sensitive must be shares of the weights below 1 in sum")
    w = weight.float()
    fisher = statistics.fisher.float()
    # Weights that no token reached still deserve a level nearby, once nothing else is at stake.
    importance = fisher + 1e-4 * fisher.mean().clamp(min=1e-30)

    kept = _largest(w.abs(), outliers) | _largest(importance * w * w, sensitive)
    base = _cluster(w, importance.masked_fill(kept, 0.0), bits, group_size, iterations)
    if not bool(kept.any()):
        return base
    return Sum((base, Sparse.from_dense(w - base.decode(), kept)))


def _cluster(
    w: Tensor, importance: Tensor, bits: int, group_size: int, iterations: int
) -> Codebook:
    """Codebook of each group of `group_size` inputs; a ragged last group is padded for free."""
    out, width = w.shape
    size = width if group_size <= 0 else min(group_size, width)
    extra = -width % size
    groups = pad(w, (0, extra)).view(-1, size)
    weights = pad(importance, (0, extra)).view(-1, size)
    levels, index = kmeans_rows(groups, weights, 2**bits, iterations)
    index = index.view(out, -1)[:, :width]
    return Codebook.pack(index, levels.view(out, -1, 2**bits), bits, size)


def _largest(score: Tensor, share: float) -> Tensor:
    """Mask of the `share` of entries with the largest score."""
    mask = torch.zeros(score.shape, dtype=torch.bool, device=score.device)
    count = int(share * score.numel())
    if count:
        mask.view(-1)[score.flatten().topk(count).indices] = True
    return mask
