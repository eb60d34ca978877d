"""What a size costs: memory and speed from the configuration, and what to pick for a budget."""

from pliant.plan.bandwidth import Bandwidth, bandwidth
from pliant.plan.memory import (
    Breakdown,
    activation_bytes,
    attention_shapes,
    kv_cache_bytes,
    weights_budget,
)
from pliant.plan.table import PlanRow, PlanTable, load_config, plan, render

__all__ = [
    "Bandwidth",
    "Breakdown",
    "PlanRow",
    "PlanTable",
    "activation_bytes",
    "attention_shapes",
    "bandwidth",
    "kv_cache_bytes",
    "load_config",
    "plan",
    "render",
    "weights_budget",
]
