"""Activation times code: the fastest kernel that a code and a device have."""

from pliant.kernels import cpu, gpu, reference  # noqa: F401  (they register their kernels)
from pliant.kernels.activations import fake_quantize_activations, rounded_activations
from pliant.kernels.decoding import decode
from pliant.kernels.dispatch import matmul, matmul_each, register

__all__ = [
    "decode",
    "fake_quantize_activations",
    "matmul",
    "matmul_each",
    "register",
    "rounded_activations",
]
