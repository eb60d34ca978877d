"""Codings of one side (keys or values) of a KV cache, one file each; they wrap each other."""

from pliant.cache.codings.coding import Coding, Parts, join, nbytes, split
from pliant.cache.codings.grid import Grid
from pliant.cache.codings.low_rank import LowRank
from pliant.cache.codings.nonuniform import Nonuniform
from pliant.cache.codings.product import Product
from pliant.cache.codings.sparse import Sparse
from pliant.cache.codings.transform import Transform

__all__ = [
    "Coding",
    "Grid",
    "LowRank",
    "Nonuniform",
    "Parts",
    "Product",
    "Sparse",
    "Transform",
    "join",
    "nbytes",
    "split",
]
