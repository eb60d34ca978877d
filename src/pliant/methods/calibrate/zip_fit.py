"""ZIP-FIT: the candidates that compress best together with samples of the target text."""

from __future__ import annotations

import zlib

import torch

from pliant.errors import PliantError
from pliant.methods.catalog import method
from pliant.observe.candidates import Candidates, Selection, check_count

_LEVEL = 9


@method(
    "zip_fit",
    kind="calibrate",
    paper="ZIP-FIT: Embedding-Free Data Selection via Compression-Based Alignment",
    needs=("texts", "target"),
)
def zip_fit(
    candidates: Candidates,
    count: int,
    *,
    seed: int = 0,
    samples: int = 16,
    sample_bytes: int = 4096,
) -> Selection:
    """The `count` candidates of the highest alignment with the target text, most aligned first.

    Alignment of a candidate c: 1 - NCD(c, t), averaged over `samples` pieces t of the target of
    `sample_bytes` each, drawn with `seed`; NCD is the normalized compression distance under
    deflate, gzip's method. Copies of a candidate are passed over while others are left. Cost:
    n * samples compressions and no model. Source: Obbad et al. 2024.
    """
    check_count(candidates, count)
    if candidates.texts is None or not candidates.target:
        raise PliantError("zip_fit needs the candidates' texts and a sample of the target text")
    pieces = _pieces(candidates.target, samples, sample_bytes, seed)
    lengths = [_size(piece) for piece in pieces]
    scores, seen, again = [], set(), []
    for text in candidates.texts:
        raw = text.encode()
        scores.append(_alignment(raw, pieces, lengths))
        again.append(raw in seen)
        seen.add(raw)
    order = sorted(range(len(scores)), key=lambda i: (again[i], -scores[i], i))
    return Selection.of(torch.tensor(order[:count]))


def _alignment(raw: bytes, pieces: list[bytes], lengths: list[int]) -> float:
    """Mean over target pieces of 1 - (C(ct) - min(C(c), C(t))) / max(C(c), C(t))."""
    own = _size(raw)
    total = 0.0
    for piece, length in zip(pieces, lengths, strict=True):
        total += 1 - (_size(raw + piece) - min(own, length)) / max(own, length)
    return total / len(pieces)


def _pieces(target: str, count: int, nbytes: int, seed: int) -> list[bytes]:
    """At most `count` of the pieces of `nbytes` that the target is cut into (all when fewer)."""
    raw = target.encode()
    starts = list(range(0, max(1, len(raw) - nbytes + 1), nbytes))
    order = torch.randperm(len(starts), generator=torch.Generator().manual_seed(seed))[:count]
    return [raw[starts[i] : starts[i] + nbytes] for i in order.tolist()]


def _size(raw: bytes) -> int:
    return len(zlib.compress(raw, _LEVEL))
