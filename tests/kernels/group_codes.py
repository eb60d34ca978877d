"""Random group codes of every form, for the tests of their kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from pliant.codes import Code, GroupInt, GroupLevels, quantize_scales


@dataclass(frozen=True)
class Form:
    """zeros: zero points, or for levels three tables and a selector."""

    bits: int
    levels: bool
    group_size: int
    scale_bits: int
    zeros: bool


def forms() -> st.SearchStrategy[Form]:
    return st.builds(
        Form,
        bits=st.integers(1, 8),
        levels=st.booleans(),
        group_size=st.sampled_from([0, 1, 7, 16, 32, 64]),
        scale_bits=st.sampled_from([16, 4, 5, 6, 7, 8]),
        zeros=st.booleans(),
    )


def group_code(form: Form, out: int, width: int, seed: int = 0) -> Code:
    generator = torch.Generator().manual_seed(seed)
    size = form.group_size if 0 < form.group_size < width else width
    groups = -(-width // size)
    q = torch.randint(0, 2**form.bits, (out, width), generator=generator)
    scales = torch.rand(out, groups, generator=generator) * 0.1 + 0.01
    stored = quantize_scales(scales, form.scale_bits)
    if form.levels:
        tables = torch.randn(3 if form.zeros else 1, 2**form.bits, generator=generator)
        chosen = torch.randint(0, 3, (out, groups), generator=generator) if form.zeros else None
        return GroupLevels.pack(q, stored, tables, chosen, form.bits, size)
    zeros = torch.randint(0, 2**form.bits, (out, groups), generator=generator)
    return GroupInt.pack(q, stored, zeros if form.zeros else None, form.bits, size)
