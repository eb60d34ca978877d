"""Large pages: which they are, and that nothing changes in them."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from pliant.kernels.cpu.pages import PAGE, collapse, covered


@given(st.lists(st.tuples(st.integers(0, 3 * PAGE), st.integers(1, PAGE)), max_size=12))
def test_pages_are_mostly_weights(gaps: list[tuple[int, int]]) -> None:
    pieces, end = [], 5 * PAGE
    for gap, size in gaps:
        pieces.append((end + gap, size))
        end += gap + size
    found = covered(reversed(pieces))
    assert all(page % PAGE == 0 for page in found)
    assert len(set(found)) == len(found)
    share = {
        page: sum(
            max(0, min(start + size, page + PAGE) - max(start, page)) for start, size in pieces
        )
        for page in range(0, end + PAGE, PAGE)
    }
    assert found == [page for page, size in share.items() if size >= 0.875 * PAGE]


def test_values_and_addresses_stay() -> None:
    values = torch.randint(0, 256, (7 * PAGE,), dtype=torch.uint8)
    copy, place = values.clone(), values.data_ptr()
    assert collapse([values, values[5:]]) <= 7
    assert values.data_ptr() == place
    assert torch.equal(values, copy)
