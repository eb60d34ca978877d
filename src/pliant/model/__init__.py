"""Opening checkpoints, naming their targets, running them layer by layer, holding them as codes."""

from pliant.model.architecture import empty_model, find_blocks
from pliant.model.calls import LinearCalls
from pliant.model.checkpoint import Checkpoint
from pliant.model.coded import (
    CodedExperts,
    CodedWeight,
    code_of,
    coded_model,
    swap,
)
from pliant.model.components import rounded_components
from pliant.model.device import find_device
from pliant.model.sources import cache_directory, open_checkpoint
from pliant.model.streamed import StreamedModel, open_streamed
from pliant.model.target import Target, find_targets

__all__ = [
    "Checkpoint",
    "CodedExperts",
    "CodedWeight",
    "LinearCalls",
    "StreamedModel",
    "Target",
    "cache_directory",
    "code_of",
    "coded_model",
    "empty_model",
    "find_blocks",
    "find_device",
    "find_targets",
    "open_checkpoint",
    "open_streamed",
    "rounded_components",
    "swap",
]
