"""The kernels between products do what their definitions say, for any size and type.

Without a GPU they run in Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from pliant.codes import GroupInt, GroupLevels
from pliant.kernels.triton import step
from tests.kernels.group_codes import Form, forms, group_code

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDING = {torch.float32: 3e-6, torch.float16: 2e-3}
if DEVICE == "cuda":
    ROUNDING[torch.bfloat16] = 1.6e-2  # the interpreter cuts off what should be rounded


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("width", [1, 64, 300])
def test_norms(width: int, dtype: torch.dtype) -> None:
    residual, more, weight = randn(1, width), randn(1, width, dtype=dtype), randn(width)
    before, x = residual.clone(), torch.empty(1, width, dtype=dtype, device=DEVICE)
    step.add_norm(residual, None, weight, 1e-5, x)
    assert apart(x, F.rms_norm(before, (width,), weight, 1e-5)) < ROUNDING[dtype]
    assert torch.equal(residual, before)
    step.add_norm(residual, more, weight, 1e-5, x)
    assert apart(residual, before + more.float()) < 1e-6
    assert apart(x, F.rms_norm(before + more.float(), (width,), weight, 1e-5)) < ROUNDING[dtype]


@pytest.mark.parametrize("dtype", ROUNDING)
def test_gate(dtype: torch.dtype) -> None:
    gate, up = randn(1, 1100, dtype=dtype), randn(1, 1100, dtype=dtype)
    x = step.gated(gate * 20, up, torch.empty_like(up))
    assert apart(x, F.silu(gate.float() * 20) * up.float()) < ROUNDING[dtype]


@settings(max_examples=8, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(form=forms(), out=st.integers(1, 30), width=st.integers(1, 300), data=st.data())
def test_a_row_of_a_code(form: Form, out: int, width: int, data: st.DataObject) -> None:
    code = group_code(form, out, width).to(DEVICE)
    assert isinstance(code, GroupInt | GroupLevels)
    index, first = data.draw(st.integers(0, out - 1)), data.draw(st.integers(0, 9))
    row = torch.full((1, width), -1.0, device=DEVICE)
    for other in (first - 1, first + out):
        step.embed(torch.tensor([other], device=DEVICE), code, first, row)
    assert bool((row == -1).all()), "a token of another part"
    step.embed(torch.tensor([first + index], device=DEVICE), code, first, row)
    torch.testing.assert_close(row, code.rows(slice(index, index + 1)), rtol=1e-6, atol=0)


@settings(max_examples=12, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    kv_heads=st.integers(1, 3),
    shared=st.integers(1, 5),
    head_dim=st.sampled_from([16, 64, 80, 128, 130]),
    length=st.integers(0, 70),
    spare=st.integers(1, 30),
    parts=st.sampled_from([None, 1, 2, 3]),
    dtypes=st.sampled_from(
        [(torch.float32, torch.float32), (torch.float16, torch.float16),
         (torch.float16, torch.float32), (torch.float32, torch.float16)]
    ),
    biased=st.booleans(),
    normed=st.booleans(),
)  # fmt: skip
def test_attention(
    kv_heads: int,
    shared: int,
    head_dim: int,
    length: int,
    spare: int,
    parts: int | None,
    dtypes: tuple[torch.dtype, torch.dtype],
    biased: bool,
    normed: bool,
) -> None:
    torch.manual_seed(length)
    dtype, storage = dtypes
    heads, capacity = kv_heads * shared, length + spare
    device = torch.device(DEVICE)
    shape = step.Heads.make(
        heads, kv_heads, head_dim, capacity, 1e-6, 0.3 / head_dim**0.5, device, 16, parts
    )
    angles = length * 0.7 ** torch.arange(head_dim // 2)
    shape.cosines.copy_(angles.cos())
    shape.sines.copy_(angles.sin())
    states = tuple(randn(1, n * head_dim, dtype=dtype) for n in (heads, kv_heads, kv_heads))
    biases = tuple(randn(s.shape[1], dtype=dtype) for s in states) if biased else None
    norms = (randn(head_dim), randn(head_dim)) if normed else None
    keys, values = (randn(1, kv_heads, capacity, head_dim, dtype=storage) for _ in range(2))
    keys[:, :, length:] = values[:, :, length:] = torch.nan  # what is not stored is never read
    past = keys[:, :, :length].clone(), values[:, :, :length].clone()
    x = torch.empty(1, heads * head_dim, dtype=dtype, device=DEVICE)
    position = torch.tensor([length], device=DEVICE)
    step.attend(shape, states, biases, norms, position, keys, values, x)  # type: ignore[arg-type]

    q, k, v = (
        (s.float() + (biases[i].float() if biases else 0)).view(-1, head_dim)
        for i, s in enumerate(states)
    )
    if norms:
        q, k = (F.rms_norm(s, (head_dim,), w, 1e-6) for s, w in zip((q, k), norms, strict=True))
    cos, sin = (t.repeat(2) for t in (shape.cosines, shape.sines))
    q, k = (
        s * cos + torch.cat((-s[:, head_dim // 2 :], s[:, : head_dim // 2]), 1) * sin
        for s in (q, k)
    )
    tolerance = max(ROUNDING[dtype], ROUNDING[storage])
    for stored, old, new in zip((keys, values), past, (k, v), strict=True):
        assert torch.equal(stored[:, :, :length], old)
        assert apart(stored[0, :, length], new) < tolerance
        assert bool(stored[:, :, length + 1 :].isnan().all())
    expected = F.scaled_dot_product_attention(
        q[None, :, None],
        keys[:, :, : length + 1].float(),
        values[:, :, : length + 1].float(),
        scale=shape.scale,
        enable_gqa=True,
    )
    assert apart(x, expected.reshape(1, -1)) < tolerance
