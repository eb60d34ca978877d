"""Group levels: the formula, the byte count, exact powers of two, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pliant.codes import GroupLevels, from_tensors, power_scales, quantize_scales
from pliant.errors import CorruptError, PliantError
from tests.codes.forms import group_levels, integers


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 8),
    st.integers(1, 11),
    st.integers(1, 200),
    st.integers(-1, 210),
    st.integers(1, 5),
    st.sampled_from([16, 4, 6, 8]),
)
def test_decode_and_nbytes_follow_the_formula(
    bits: int, out: int, width: int, group: int, tables: int, scale_bits: int
) -> None:
    size = min(group, width) if group > 0 else width
    groups = -(-width // size)
    index, levels = integers(2**bits, out, width), torch.randn(tables, 2**bits).half()
    stored = quantize_scales(torch.rand(out, groups) + 0.01, scale_bits)
    selector = integers(tables, out, groups) if tables > 1 else None
    code = GroupLevels.pack(index, stored, levels, selector, bits, group)
    member = torch.arange(width) // size
    table = torch.zeros(out, groups).long() if selector is None else selector.long()
    expected = levels.float()[table[:, member], index.long()] * stored.scales_as()[:, member]
    assert torch.equal(code.decode(), expected)
    assert torch.equal(code.indices(), index)
    assert torch.equal(code.selected().long(), table)

    def packed(columns: int, planes: list[int]) -> int:
        return out * sum(-(-columns * plane // 8) for plane in planes)

    planes = {1: [1], 2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}
    scale_bytes = 2 * out * groups if scale_bits == 16 else packed(groups, planes[scale_bits])
    row_bytes = 0 if scale_bits == 16 else 2 * out
    selector_bytes = packed(groups, planes[{2: 1, 3: 2, 4: 2, 5: 3}[tables]]) if tables > 1 else 0
    table_bytes = 2 * tables * 2**bits
    assert code.nbytes == (
        packed(width, planes[bits]) + scale_bytes + row_bytes + selector_bytes + table_bytes
    )


@pytest.mark.parametrize("bits", [1, 3, 5, 8])
def test_powers_of_two_are_exact_and_clamped_to_their_bits(bits: int) -> None:
    exponents = torch.arange(-140, 140)[None]
    stored = power_scales(exponents, bits)
    lowest = -126 if bits == 8 else 127 - (2**bits - 1)
    expected = torch.ones((), dtype=torch.float64) * 2.0 ** exponents.clamp(lowest, 127).double()
    assert torch.equal(stored.scales_as(torch.float64), expected)
    assert sum(t.nbytes for t in stored.tensors().values()) == sum(
        -(-280 * plane // 8) for plane in {1: [1], 3: [2, 1], 5: [4, 1], 8: [8]}[bits]
    )


def test_a_rows_factor_multiplies_its_powers() -> None:
    exponents, factor = torch.tensor([[0, -1], [-3, 0]]), torch.tensor([0.3, 7.0])
    stored = power_scales(exponents, 2, factor)
    expected = torch.tensor([[1.0, 0.5], [0.125, 1.0]]) * factor.half().float()[:, None]
    assert torch.equal(stored.scales_as(), expected)
    assert torch.equal(stored.rows(torch.tensor([1])).scales_as(), expected[1:])


@pytest.mark.parametrize("powers", [False, True])
@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"bits": 9}, "bits"),
        ({"group_size": 0}, "group_size"),
        ({"tables": 0}, "tables"),
        ({"tables": 2}, "tables"),
        ({"scale_bits": 11}, "scale_bits"),
        ({"powers": 1}, "powers"),
        ({"shape": [8, 61]}, "expected"),
    ],
)
def test_damaged_meta_is_told(change: dict, word: str, powers: bool) -> None:
    code = group_levels(8, 60, tables=3, powers=powers, size=8)
    with pytest.raises(CorruptError, match=word):
        from_tensors(code.meta() | change, code.tensors())


def test_a_selector_beyond_the_tables_is_told() -> None:
    code = group_levels(8, 60, tables=3)
    bad = code.tensors() | {"selector.2": torch.full_like(code.tensors()["selector.2"], 255)}
    with pytest.raises(CorruptError, match="selector"):
        from_tensors(code.meta(), bad)
    powers = group_levels(8, 60, powers=True, size=8)
    with pytest.raises(CorruptError, match="base"):
        from_tensors(powers.meta() | {"base": 300}, powers.tensors())


def test_parts_that_do_not_fit_are_refused() -> None:
    index, scales = integers(16, 4, 40), quantize_scales(torch.rand(4, 2))
    levels = torch.randn(2, 16)
    selector = integers(2, 4, 2)
    assert GroupLevels.pack(index, scales, levels, selector, 4, 32).shape == (4, 40)
    for arguments, word in (
        ((index, scales, levels, None, 4, 32), "selector"),
        ((index, scales, levels[:1], selector, 4, 32), "selector"),
        ((index, scales, levels, selector[:1], 4, 32), "selector"),
        ((index, scales, levels, selector + 1, 4, 32), "selector"),
        ((index, scales, levels, selector, 4, 16), "scales"),
        ((index, scales, levels[:, :8], selector, 4, 32), "tables"),
        ((index + 9, scales, levels, selector, 4, 32), "index"),
        ((index, scales, levels, selector, 9, 32), "bits"),
    ):
        with pytest.raises(PliantError, match=word):
            GroupLevels.pack(*arguments)
    with pytest.raises(PliantError, match="exponents"):
        power_scales(torch.zeros(1, 1), 9)
