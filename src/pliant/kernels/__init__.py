"""Activation times code: the fastest kernel that a code and a device have."""

from pliant.kernels import reference  # noqa: F401  (registers its kernels)
from pliant.kernels.dispatch import matmul, register

__all__ = ["matmul", "register"]
