"""Codes in large pages: a decoded token reads every weight once, so that looking up where small
pages lie takes as long as much of the reading.

Linux gives large pages to who asks (transparent huge pages of 2 MiB). Weights are read into memory
long before they are known to stay, so the pages that hold them are collapsed afterwards.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections import Counter
from collections.abc import Iterable
from functools import cache
from typing import Any

from torch import Tensor

PAGE = 2 * 2**20
_COLLAPSE = 25  # MADV_COLLAPSE, Linux 6.1
_FULL = 0.875  # of a page that must be weights, so that little else is held with them


def covered(pieces: Iterable[tuple[int, int]]) -> list[int]:
    """Addresses of the large pages that pieces (address, bytes) fill, nearly or wholly."""
    filled: Counter[int] = Counter()
    for start, size in pieces:
        for page in range(start // PAGE, -(-(start + size) // PAGE)):
            filled[page] += min(start + size, (page + 1) * PAGE) - max(start, page * PAGE)
    return sorted(page * PAGE for page, size in filled.items() if size >= _FULL * PAGE)


def collapse(tensors: Iterable[Tensor]) -> int:
    """Ask for large pages under the tensors' storages; how many the system gave.

    Values and addresses stay. Where it cannot be, nothing happens.
    """
    advise = _advise()
    if advise is None:
        return 0
    storages = (tensor.untyped_storage() for tensor in tensors)
    pieces = {storage.data_ptr(): storage.nbytes() for storage in storages}
    given = 0
    for page in covered(pieces.items()):
        advise(page, PAGE, mmap.MADV_HUGEPAGE)
        given += advise(page, PAGE, _COLLAPSE) == 0
    return given


@cache
def _advise() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return advise
