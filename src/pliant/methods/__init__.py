"""Published methods, one file each: a weight and its statistics become a code."""

from pliant.methods.catalog import MethodInfo, catalog, find, method

__all__ = ["MethodInfo", "catalog", "find", "method"]
