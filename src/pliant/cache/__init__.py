"""KV caches: what a model remembers of the tokens it has seen."""

from pliant.cache.dense import DenseCache
from pliant.cache.encoding import CODED_BITS, PAGE_TOKENS, PageShape
from pliant.cache.forward import Chunk, PagedModel, extended
from pliant.cache.pages import OutOfPages, Page, PagePool
from pliant.cache.prefix import PrefixTree
from pliant.cache.sequence import PagedSequence

__all__ = [
    "CODED_BITS",
    "PAGE_TOKENS",
    "Chunk",
    "DenseCache",
    "OutOfPages",
    "Page",
    "PagePool",
    "PageShape",
    "PagedModel",
    "PagedSequence",
    "PrefixTree",
    "extended",
]
