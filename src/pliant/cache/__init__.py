"""KV caches: what a model remembers of the tokens it has seen."""

from pliant.cache.dense import DenseCache

__all__ = ["DenseCache"]
