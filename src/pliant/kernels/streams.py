"""Work on a GPU beside other work on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


def launched_on(device: torch.device) -> AbstractContextManager[None]:
    """With that GPU as the current one; nothing where kernels are interpreted on a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@contextmanager
def aside(device: torch.device) -> Iterator[torch.cuda.Stream]:
    """A stream of its own, after all that the device was given before and before what comes after.

    What is to be captured as a CUDA graph first runs here: libraries set themselves up, kernels are
    compiled.
    """
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    around = torch.cuda.current_stream(device)
    stream.wait_stream(around)
    with torch.cuda.device(device), torch.cuda.stream(stream):
        yield stream
    around.wait_stream(stream)
