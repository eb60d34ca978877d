"""The launched weight of a trainable matrix, and its gradients, are those of plain torch.

Without a GPU it runs in Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from pliant.codes import GroupLevels, quantize_scales
from pliant.kernels.triton.latent import levels_weight
from pliant.methods import latent

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(("out", "width", "size"), [(5, 70, 32), (3, 33, 16), (18, 12, 12)])
@pytest.mark.parametrize(("bits", "tables", "scale_bits"), [(1, 2, 6), (3, 1, 16), (4, 3, 6)])
def test_weight_and_gradients(
    out: int, width: int, size: int, bits: int, tables: int, scale_bits: int
) -> None:
    generator = torch.Generator().manual_seed(out * bits)
    groups = -(-width // size)
    scales = torch.rand(out, groups, generator=generator) + 0.1
    index = torch.randint(0, 2**bits, (out, width), generator=generator)
    selector = None if tables == 1 else torch.randint(0, tables, (out, groups), generator=generator)
    levels = torch.randn(tables, 2**bits, generator=generator).sort(1).values
    code = GroupLevels.pack(
        index.to(torch.uint8), quantize_scales(scales, scale_bits), levels,
        None if selector is None else selector.to(torch.uint8), bits, size,
    )  # fmt: skip
    looped = latent.latent_of(code, torch.randn(out, width, generator=generator))
    assert isinstance(looped, latent.LatentLevels)
    with torch.no_grad():  # beyond the levels, where no gradient is, as well
        looped.position.add_(torch.randn(looped.position.shape, generator=generator))
    gradient = torch.randn(out, width, generator=generator)
    expected = looped.weight()
    expected.backward(gradient)
    position = looped.position.detach().to(DEVICE).requires_grad_(True)
    log_scale = looped.log_scale.detach().to(DEVICE).requires_grad_(True)
    launched = levels_weight(
        position, log_scale, looped._levels.to(DEVICE), unit=looped._unit, reach=latent._REACH,
        scale_bits=scale_bits, width=width,
    )  # fmt: skip
    torch.testing.assert_close(launched.cpu(), expected, rtol=1e-5, atol=1e-6)
    launched.backward(gradient.to(DEVICE))
    assert looped.position.grad is not None
    assert position.grad is not None
    assert log_scale.grad is not None
    torch.testing.assert_close(position.grad.cpu(), looped.position.grad, rtol=1e-5, atol=1e-6)
    # plain torch keeps the values in 16 bits for the way back
    torch.testing.assert_close(log_scale.grad.cpu(), looped.log_scale.grad, rtol=2e-2, atol=2e-2)
    assert (looped.position.grad == 0).any(), "some positions are out of reach"
