"""BCT: every block of every component on its own symmetric scale, without data or training."""

from __future__ import annotations

from torch import Tensor

from pliant.codes import GroupInt
from pliant.methods.catalog import method
from pliant.methods.quantize.rtn import rtn
from pliant.observe.statistics import Statistics


@method(
    "bct",
    kind="quantize",
    paper="Blockwise Compression of Transformer-based Models without Retraining",
)
def bct(
    weight: Tensor,  # [out, in]
    statistics: Statistics,
    *,
    bits: int = 4,
    block: int = 64,
) -> GroupInt:
    """Symmetric integers with one fp16 scale for each `block` inputs of a row, unclipped.

    The weights' half of the paper: its embedding and matmul weights. Its other half rounds what
    embeddings, multiplies, norms, softmax and activation functions give, in blocks as well:
    `model.rounded_components`. Needs no data. Cost: one pass.
    """
    made: GroupInt = rtn(
        weight, Statistics(), bits=bits, group_size=block, symmetric=True, clip=False
    )
    return made
