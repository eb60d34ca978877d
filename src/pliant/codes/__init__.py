"""The stored forms of a matrix: immutable values with an exact size, one file a form."""

from pliant.codes.base import Code, from_tensors
from pliant.codes.block_rotated import BlockRotated
from pliant.codes.codebook import Codebook
from pliant.codes.column_stack import ColumnStack
from pliant.codes.dense import Dense
from pliant.codes.group_int import GroupInt, GroupScales, quantize_scales
from pliant.codes.group_levels import GroupLevels
from pliant.codes.low_rank import LowRank
from pliant.codes.permuted import Permuted
from pliant.codes.power_scales import PowerScales, power_scales
from pliant.codes.rotated import Rotated
from pliant.codes.row_stack import RowStack
from pliant.codes.scaled import Scaled
from pliant.codes.signed import Signed
from pliant.codes.sparse import Sparse
from pliant.codes.sum import Sum
from pliant.codes.ternary import Ternary

__all__ = [
    "BlockRotated",
    "Code",
    "Codebook",
    "ColumnStack",
    "Dense",
    "GroupInt",
    "GroupLevels",
    "GroupScales",
    "LowRank",
    "Permuted",
    "PowerScales",
    "Rotated",
    "RowStack",
    "Scaled",
    "Signed",
    "Sparse",
    "Sum",
    "Ternary",
    "from_tensors",
    "power_scales",
    "quantize_scales",
]
