"""Products of the common codes beside the speed of the memory that they read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch

from pliant.bench.calibrate import compute_dtype
from pliant.bench.samples import COMMON
from pliant.bench.timing import Timer, beyond_cache, copies, time_product
from pliant.plan.bandwidth import bandwidth, processor_name

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
BATCHES = (1, 8, 256)
SECONDS, QUICK_SECONDS = 0.2, 0.05  # of timing for each product, about


def bench_kernels(
    device: torch.device,
    *,
    shapes: Sequence[tuple[int, int]] | None = None,
    batches: Sequence[int] | None = None,
    quick: bool = False,
    timer: Timer = time_product,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Seconds and bytes a second of each common code at each shape [out, in] and batch.

    bytes_per_second: of the code's own bytes, read once a product. share: of what this machine's
    memory reads. quick: one shape, no prefill, less time for each.
    """
    shapes = shapes or (SHAPES[:1] if quick else SHAPES)
    batches = batches or (BATCHES[:2] if quick else BATCHES)
    seconds = QUICK_SECONDS if quick else SECONDS
    ceiling = bandwidth(device, refresh=True).bytes_per_second
    rows: list[dict[str, Any]] = []
    of = len(shapes) * len(COMMON) * len(batches)
    for shape, (name, sample) in product(shapes, COMMON.items()):
        codes = copies(sample(*shape).to(device), beyond_cache(device))
        for batch in batches:
            if progress:
                progress(len(rows), of)
            x = torch.randn(batch, shape[1], device=device).to(compute_dtype(device))
            took = timer(codes, x, seconds)
            rate = codes[0].nbytes / took
            rows.append(
                {"code": name, "shape": list(shape), "batch": batch, "bits": codes[0].bits,
                 "nbytes": codes[0].nbytes, "seconds": took, "bytes_per_second": rate,
                 "share": rate / ceiling}
            )  # fmt: skip
    if progress:
        progress(of, of)
    return {
        "device": processor_name(device),
        "read_bytes_per_second": ceiling,
        "rows": rows,
    }
