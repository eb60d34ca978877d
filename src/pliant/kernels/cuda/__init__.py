"""Kernels in CUDA C++, compiled by nvcc on first use; without it the Triton kernels stand in."""
