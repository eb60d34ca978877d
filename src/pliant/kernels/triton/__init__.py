"""Kernels in Triton: imported only where a GPU (or Triton's interpreter) is there to run them."""
