"""The launched divergence and its gradient are those of plain torch.

Without a GPU it runs in Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import kl_div

pytest.importorskip("triton")

from pliant.kernels.triton.divergence import mean_divergence

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 3, 2048), (2, 4099)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_divergence_and_gradient(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(shape[-1])
    own = (torch.randn(shape, generator=generator) * 6).to(dtype).to(DEVICE).requires_grad_()
    original = (torch.randn(shape, generator=generator) * 6).to(DEVICE)
    original[..., -1] -= 200  # a token that is never said
    found = mean_divergence(own, original)
    (found * 3).backward()
    gradient, own.grad = own.grad, None
    rows = own.double().log_softmax(-1).flatten(0, -2)
    expected = kl_div(
        rows, original.double().log_softmax(-1).flatten(0, -2),
        reduction="batchmean", log_target=True,
    )  # fmt: skip
    (expected * 3).backward()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert gradient is not None
    assert own.grad is not None
    assert gradient.dtype == dtype
    near = 1e-6 if dtype == torch.float32 else 2**-7 * float(own.grad.float().abs().max())
    torch.testing.assert_close(gradient.float(), own.grad.float(), rtol=1e-4, atol=near)


def test_equal_logits_have_no_divergence_and_no_gradient() -> None:
    own = torch.randn(4, 300, device=DEVICE).requires_grad_()
    found = mean_divergence(own, own.detach().clone())
    found.backward()
    assert abs(float(found.detach())) < 1e-6
    assert own.grad is not None
    assert float(own.grad.abs().max()) < 1e-8


def test_strided_logits() -> None:
    own, original = torch.randn(2, 50, 6, device=DEVICE), torch.randn(2, 50, 6, device=DEVICE)
    found = mean_divergence(own.mT, original.mT)
    torch.testing.assert_close(
        found, mean_divergence(own.mT.contiguous(), original.mT.contiguous())
    )
