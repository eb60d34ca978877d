"""The launched weights of trainable matrices, and steps of Adam on them, are those of plain torch.

Without a GPU they run in Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from pliant.codes import Code, GroupInt, GroupLevels, quantize_scales
from pliant.fit.descent import BETAS, EPS, corrected, descend, write_weights
from pliant.kernels.triton import latent as launches
from pliant.methods import latent

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":  # the interpreter runs one after another
        monkeypatch.setattr(launches, "_PROGRAMS", 3)


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
def test_weight_and_steps_of_levels(
    out: int, width: int, size: int, bits: int, tables: int, scale_bits: int
) -> None:
    check([levels(out, width, size, bits, tables, scale_bits)])


@pytest.mark.parametrize(("out", "width", "size"), SHAPES)
@pytest.mark.parametrize(("bits", "zeros", "scale_bits"), [(2, True, 6), (5, False, 16)])
def test_weight_and_steps_of_integers(
    out: int, width: int, size: int, bits: int, zeros: bool, scale_bits: int
) -> None:
    check([integers(out, width, size, bits, zeros, scale_bits)])


def test_matrices_of_many_forms_and_sizes_take_their_steps_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launches, "_ROWS", 8)  # large ones are several entries
    check(
        [
            levels(20, 40, 16, 3, 2, 6),
            levels(5, 48, 16, 3, 1, 16),
            integers(9, 33, 16, 4, True, 6),
            levels(3, 24, 12, 2, 1, 8),
            integers(15, 16, 16, 4, False, 8),
        ]
    )


def check(codes: list[Code]) -> None:
    """Three steps, each from plain torch's state; every other matrix misses the second."""
    expected, found = made(codes, "cpu"), made(codes, DEVICE)
    generator = torch.Generator().manual_seed(1)
    for step in range(3):
        some = slice(None) if step != 1 else slice(0, None, 2)
        for own, theirs in zip(found, expected, strict=True):
            take_over(own, theirs)
        weights = [each.weight().detach() for each in expected[some]]
        written = [torch.full(w.shape, torch.nan, device=DEVICE) for w in weights]
        launches.write_weights(found[some], written)
        for own, weight in zip(written, weights, strict=True):
            torch.testing.assert_close(own.cpu(), weight, rtol=1e-5, atol=1e-6)
        halves = [torch.empty(w.shape, device=DEVICE, dtype=torch.bfloat16) for w in weights]
        launches.write_weights(found[some], halves)
        for half, own in zip(halves, written, strict=True):
            # the interpreter cuts where a GPU rounds
            torch.testing.assert_close(half, own.bfloat16(), rtol=2**-7, atol=0)

        gradients = [torch.randn(w.shape, generator=generator) for w in weights]
        descend(expected[some], gradients, lambda bits: 0.01 * bits, 0.002)
        for each in found[some]:
            each.begin_step()
        rates = [corrected(0.01 * f.bits, 0.002, f.steps) for f in found[some]]
        launches.descend(found[some], [g.to(DEVICE) for g in gradients], rates, BETAS, EPS)
        for own, theirs in zip(found, expected, strict=True):
            assert own.steps == theirs.steps
            torch.testing.assert_close(own.position.cpu(), theirs.position, rtol=1e-4, atol=1e-5)
            # plain torch keeps the values in 16 bits for the way back
            torch.testing.assert_close(own.log_scale.cpu(), theirs.log_scale, rtol=0, atol=1e-3)
            for mine, moment in zip(own.moments[:2], theirs.moments, strict=False):
                torch.testing.assert_close(mine.cpu(), moment, rtol=1e-4, atol=1e-6)
            for mine, moment in zip(own.moments[2:], theirs.moments[2:], strict=True):
                torch.testing.assert_close(mine.cpu(), moment, rtol=2e-2, atol=2e-2)
    assert any((each.moments[0] == 0).any() for each in expected), "some are out of reach"


@torch.no_grad()
def take_over(own: latent.Latent, theirs: latent.Latent) -> None:
    mine = (own.position, own.log_scale, *own.moments)
    for tensor, value in zip(
        mine, (theirs.position, theirs.log_scale, *theirs.moments), strict=False
    ):
        tensor.copy_(value)


def made(codes: list[Code], device: str) -> list[latent.Latent]:
    """Latents with positions beyond the grid, where no gradient is, as well."""
    found = []
    for code in codes:
        generator = torch.Generator().manual_seed(0)
        one = latent.latent_of(code, torch.randn(code.shape, generator=generator))
        assert one is not None
        with torch.no_grad():
            spread = 1.0 if isinstance(code, GroupLevels) else 2.0**one.bits
            one.position.add_(spread * torch.randn(one.position.shape, generator=generator))
        if device != "cpu":
            moved = latent.latent_of(code.to(device), torch.zeros(code.shape, device=device))
            assert moved is not None
            with torch.no_grad():
                moved.position.copy_(one.position)
            one = moved
        found.append(one)
    return found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_latents_on_a_gpu_are_written_and_moved_by_launches() -> None:
    gradient = torch.randn(6, 64)
    found = []
    for device in ("cpu", "cuda"):
        ones = made([levels(6, 64, 16, 3, 2, 6)], device)
        here = torch.empty(6, 64, device=device)
        descend(ones, [gradient.to(device)], lambda bits: 0.1, 0.01)
        write_weights(ones, [here])
        found.append(here.cpu())
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


def test_a_step_without_a_gpu_is_that_of_torch() -> None:
    code = levels(6, 64, 16, 3, 2, 6)
    (own,), (reference,) = made([code], "cpu"), made([code], "cpu")
    optimizer = torch.optim.Adam(
        [{"params": [reference.position], "lr": 0.1}, {"params": [reference.log_scale]}],
        lr=0.01, betas=BETAS,
    )  # fmt: skip
    for _ in range(3):
        gradient = torch.randn(6, 64)
        descend([own], [gradient], lambda bits: 0.1, 0.01)
        optimizer.zero_grad()
        reference.weight().backward(gradient)
        optimizer.step()
    torch.testing.assert_close(own.position, reference.position)
    torch.testing.assert_close(own.log_scale, reference.log_scale)
