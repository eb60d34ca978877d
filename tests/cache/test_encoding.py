"""Codes of a page: their bytes are counted to the last, and their error is the grid's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    FalconH1Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3NextConfig,
)

from pliant.cache import CODED_BITS, PageShape
from pliant.cache.encoding import decode, encode
from pliant.errors import PliantError, UnsupportedModelError
from pliant.plan import kv_cache_bytes

shapes = st.builds(
    PageShape, st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9),
    st.integers(1, 9), st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(shapes, st.sampled_from(CODED_BITS), st.integers(0, 99))
def test_bytes_are_those_of_the_tensor_and_errors_half_a_step(shape, bits, seed):
    generator = torch.Generator().manual_seed(seed)
    size = (shape.layers, shape.tokens, shape.width)
    data = (torch.randn(size, generator=generator) * 3 + 1).to(shape.dtype)
    assert data.nbytes == shape.nbytes() == shape.empty(shape.bits, torch.device("cpu")).nbytes
    codes = encode(data, shape, bits)
    assert codes.dtype == torch.uint8
    assert codes.shape == shape.empty(bits, torch.device("cpu")).shape
    assert codes.nbytes == shape.nbytes(bits)
    found = decode(codes, shape, bits, torch.float32)
    assert found.shape == size
    keys, values = data.float().split([shape.keys, shape.width - shape.keys], dim=-1)
    values = values.unflatten(-1, (shape.kv_heads, -1))
    key_error, value_error = (
        (found - data.float()).abs().split([shape.keys, shape.width - shape.keys], dim=-1)
    )
    value_error = value_error.unflatten(-1, (shape.kv_heads, -1))
    for numbers, error, dim in ((keys, key_error, 1), (values, value_error, -1)):
        span = numbers.amax(dim, keepdim=True) - numbers.amin(dim, keepdim=True)
        allowed = 0.5 * span / (2**bits - 1) + 2e-3 * numbers.abs().amax(dim, keepdim=True)
        assert (error <= allowed + 1e-6).all()


def test_a_constant_comes_back_and_more_bits_are_nearer():
    shape = PageShape(2, 2, 8, 8)
    flat = torch.full((2, 16, 32), 1.5, dtype=torch.bfloat16)
    data = torch.randn(2, 16, 32).bfloat16()
    errors = []
    for bits in CODED_BITS:
        assert torch.equal(decode(encode(flat, shape, bits), shape, bits, torch.bfloat16), flat)
        again = decode(encode(data, shape, bits), shape, bits, torch.float32)
        errors.append(float((again - data.float()).square().mean()))
    assert errors == sorted(errors)


def test_keys_with_large_channels_survive_two_bits():
    """What rounding keys per channel is for: a channel of large keys costs the others nothing."""
    shape = PageShape(1, 1, 16, 16)
    data = torch.randn(1, 16, 32)
    error = (decode(encode(data, shape, 2), shape, 2, torch.float32) - data).abs()
    loud = data.clone()
    loud[..., 3] += 500
    louder = (decode(encode(loud, shape, 2), shape, 2, torch.float32) - loud).abs()
    others = [i for i in range(16) if i != 3]
    assert torch.equal(louder[..., others], error[..., others])


def test_sixteen_bit_pages_take_what_a_plan_counts():
    for heads, size, layers in ((3, 64, 30), (8, 128, 32), (4, 24, 2)):
        config = LlamaConfig(
            num_hidden_layers=layers, num_attention_heads=2 * heads, num_key_value_heads=heads,
            head_dim=size, hidden_size=48,
        )  # fmt: skip
        shape = PageShape.of(config)
        assert shape.bits == 16
        assert shape.pages(2048) * shape.nbytes() == kv_cache_bytes(config, 2048, 1)
        assert shape.pages(2040) * shape.nbytes() == kv_cache_bytes(config, 2048, 1)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (MistralConfig(sliding_window=8), "within a window"),
        (Gemma3TextConfig(num_hidden_layers=12), "within a window"),
        (Qwen3NextConfig(num_hidden_layers=4), "no keys and values"),
        (FalconH1Config(num_hidden_layers=2), "more than keys and values"),
    ],
)
def test_other_models_are_refused(config, reason):
    with pytest.raises(UnsupportedModelError, match=reason):
        PageShape.of(config)


def test_bad_shapes_are_refused():
    with pytest.raises(PliantError, match="positive"):
        PageShape(1, 1, 8, 8, tokens=0)
    with pytest.raises(PliantError, match="16 or 32 bits"):
        PageShape(1, 1, 8, 8, dtype=torch.int8)
    with pytest.raises(PliantError, match="not 5"):
        PageShape(1, 1, 8, 8).nbytes(5)
