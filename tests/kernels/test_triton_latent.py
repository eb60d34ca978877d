"""The launched weight of a trainable matrix, and its gradients, are those of plain torch.

Without a GPU it runs in Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from pliant.codes import Code, GroupInt, GroupLevels, quantize_scales
from pliant.kernels.triton.latent import gradients, write_weight
from pliant.methods import latent

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(5, 70, 32), (3, 33, 16), (18, 12, 12), (2, 300, 300)]


def levels(out: int, width: int, size: int, bits: int, tables: int, scale_bits: int) -> Code:
    generator = torch.Generator().manual_seed(out * bits)
    groups = -(-width // size)
    scales = torch.rand(out, groups, generator=generator) + 0.1
    index = torch.randint(0, 2**bits, (out, width), generator=generator)
    selector = None if tables == 1 else torch.randint(0, tables, (out, groups), generator=generator)
    values = torch.randn(tables, 2**bits, generator=generator).sort(1).values
    return GroupLevels.pack(
        index.to(torch.uint8), quantize_scales(scales, scale_bits), values,
        None if selector is None else selector.to(torch.uint8), bits, size,
    )  # fmt: skip


def integers(out: int, width: int, size: int, bits: int, zeros: bool, scale_bits: int) -> Code:
    generator = torch.Generator().manual_seed(out * bits)
    shape = out, -(-width // size)
    scales = torch.rand(shape, generator=generator) + 0.1
    q = torch.randint(0, 2**bits, (out, width), generator=generator)
    zero = torch.randint(0, 2**bits, shape, generator=generator)
    return GroupInt.pack(
        q.to(torch.uint8), quantize_scales(scales, scale_bits),
        zero.to(torch.uint8) if zeros else None, bits, size,
    )  # fmt: skip


@pytest.mark.parametrize(("out", "width", "size"), SHAPES)
@pytest.mark.parametrize(("bits", "tables", "scale_bits"), [(1, 2, 6), (3, 1, 16), (4, 3, 6)])
def test_weight_and_gradients_of_levels(
    out: int, width: int, size: int, bits: int, tables: int, scale_bits: int
) -> None:
    check(levels(out, width, size, bits, tables, scale_bits))


@pytest.mark.parametrize(("out", "width", "size"), SHAPES)
@pytest.mark.parametrize(("bits", "zeros", "scale_bits"), [(2, True, 6), (5, False, 16)])
def test_weight_and_gradients_of_integers(
    out: int, width: int, size: int, bits: int, zeros: bool, scale_bits: int
) -> None:
    check(integers(out, width, size, bits, zeros, scale_bits))


def check(code: Code) -> None:
    generator = torch.Generator().manual_seed(0)
    looped = latent.latent_of(code, torch.randn(code.shape, generator=generator))
    assert looped is not None
    with torch.no_grad():  # beyond the grid, where no gradient is, as well
        spread = 1.0 if isinstance(code, GroupLevels) else 2.0**looped.bits
        looped.position.add_(spread * torch.randn(looped.position.shape, generator=generator))
    gradient = torch.randn(code.shape, generator=generator)
    expected = looped.weight()
    looped.pull(gradient)

    position, log_scale = (x.detach().to(DEVICE) for x in (looped.position, looped.log_scale))
    grid = looped.grid()._replace(points=looped.grid().points.to(DEVICE))
    written = torch.empty(code.shape, device=DEVICE)
    write_weight(position, log_scale, written, grid, looped.scale_bits)
    torch.testing.assert_close(written.cpu(), expected, rtol=1e-5, atol=1e-6)
    half = torch.empty(code.shape, device=DEVICE, dtype=torch.bfloat16)
    write_weight(position, log_scale, half, grid, looped.scale_bits)
    # the interpreter cuts where a GPU rounds
    torch.testing.assert_close(half, written.bfloat16(), rtol=2**-7, atol=0)

    to_position, to_scale = gradients(
        position, log_scale, gradient.to(DEVICE), grid, looped.scale_bits
    )
    assert looped.position.grad is not None
    assert looped.log_scale.grad is not None
    torch.testing.assert_close(to_position.cpu(), looped.position.grad, rtol=1e-5, atol=1e-6)
    # plain torch keeps the values in 16 bits for the way back
    torch.testing.assert_close(to_scale.cpu(), looped.log_scale.grad, rtol=2e-2, atol=2e-2)
    assert (looped.position.grad == 0).any(), "some positions are out of reach"
    assert (looped.position.grad != 0).any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_latent_on_a_gpu_is_written_and_pulled_by_launches() -> None:
    code, gradient = levels(6, 64, 16, 3, 2, 6), torch.randn(6, 64)
    here: Tensor
    found = []
    for device in ("cpu", "cuda"):
        one = latent.latent_of(code.to(device), torch.zeros(6, 64, device=device))
        assert one is not None
        here = torch.empty(6, 64, device=device)
        one.write(here)
        one.pull(gradient.to(device))
        assert one.position.grad is not None
        found.append((here.cpu(), one.position.grad.cpu()))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)
