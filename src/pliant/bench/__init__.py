"""Speed on this machine: kernels and models beside the memory's, and what predicts them."""

from pliant.bench.artifacts import bench_artifact, predicted_speed
from pliant.bench.calibrate import costs_of_artifact, costs_of_config, products_of_config
from pliant.bench.kernels import bench_kernels

__all__ = [
    "bench_artifact",
    "bench_kernels",
    "costs_of_artifact",
    "costs_of_config",
    "predicted_speed",
    "products_of_config",
]
