"""A calibration mix of several texts whose domains match the target text's."""

from __future__ import annotations

import torch
from torch import Tensor

from pliant.errors import PliantError
from pliant.methods.catalog import method
from pliant.observe.candidates import Candidates, Selection, check_count


@method(
    "domain_mix",
    kind="calibrate",
    paper="Quantizing Large Language Models for Code Generation: A Differentiated Replication",
    needs=("sources", "target_ids"),
)
def domain_mix(
    candidates: Candidates, count: int, *, seed: int = 0, smoothing: float = 0.01
) -> Selection:
    """`count` candidates, from each text as many as its share of the target says, at random.

    The paper finds that at 2 and 3 bits calibration text should be of the domain that the model
    will work in. Shares are those under which the target's tokens are most likely as a mixture of
    the texts' token frequencies (`shares`). `smoothing`: part of every frequency that is uniform.
    A text with fewer candidates than its share leaves the rest to the others. Cost: a count of
    the tokens. Source: Giagnorio et al. 2025 for the finding; the estimate of shares is ours.
    """
    check_count(candidates, count)
    if candidates.sources is None or candidates.target_ids is None:
        raise PliantError("domain_mix needs several texts and a sample of the target text")
    sources = candidates.sources
    names = torch.unique(sources).tolist()
    members = [(sources == name).nonzero()[:, 0] for name in names]
    texts = [candidates.ids[own].flatten() for own in members]
    parts = shares(texts, candidates.target_ids.flatten(), smoothing)
    generator = torch.Generator().manual_seed(seed)
    chosen = [
        own[torch.randperm(len(own), generator=generator)[:n]]
        for own, n in zip(members, _counts(parts, [len(m) for m in members], count), strict=True)
    ]
    indices = torch.cat(chosen)
    # Shuffled: whoever takes some from the front takes a sample of the mix.
    return Selection.of(indices[torch.randperm(count, generator=generator)])


def shares(texts: list[Tensor], target: Tensor, smoothing: float = 0.01) -> Tensor:
    """The weights [texts] of the mixture of token frequencies that makes `target` most likely.

    texts, target: token ids, flat. Expectation maximization from equal weights: the likelihood is
    concave in the weights, so it finds the best.
    """
    if not len(target):
        raise PliantError("the sample of the target text has no tokens")
    size = 1 + int(max([int(target.max()), *(int(text.max()) for text in texts)]))
    counts = torch.bincount(target, minlength=size).double()
    rows = []
    for text in texts:
        seen = torch.bincount(text, minlength=size).double()
        rows.append((1 - smoothing) * seen / seen.sum() + smoothing / size)
    likely = torch.stack(rows)[:, counts > 0]  # [texts, tokens of the target]
    counts = counts[counts > 0] / len(target)
    weights = torch.full((len(texts),), 1 / len(texts), dtype=torch.float64)
    for _ in range(1000):
        joint = weights[:, None] * likely
        updated = (joint / joint.sum(0) * counts).sum(1)
        moved = float((updated - weights).abs().max())
        weights = updated
        if moved < 1e-9:
            break
    return weights


def _counts(parts: Tensor, available: list[int], count: int) -> list[int]:
    """Whole numbers that add up to `count`, none above its text's, nearest to their shares."""
    found = [0] * len(available)
    for _ in range(count):  # each goes where the most of a share is still owed
        owed = [
            float(part) * count - n if n < most else float("-inf")
            for part, n, most in zip(parts, found, available, strict=True)
        ]
        found[owed.index(max(owed))] += 1
    return found
