"""BCT: blocks err less than layers, for weights and for all that a model computes between them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from pliant.codes import Code
from pliant.kernels import fake_quantize_activations
from pliant.methods.quantize.bct import bct
from pliant.model import coded_model, find_targets
from pliant.model.components import rounded_components
from pliant.observe.statistics import Statistics
from tests.model.tiny import build, configurations

torch.set_num_threads(1)
IDS = torch.randint(3, 320, (4, 24), generator=torch.Generator().manual_seed(0))


def test_a_block_has_its_own_scale_and_four_bits_are_near_an_eighth() -> None:
    torch.manual_seed(0)
    weight = torch.randn(32, 1024) * torch.randn(1, 1024).exp()
    errors = [
        float((bct(weight, Statistics(), block=b).decode() - weight).norm()) for b in (32, 128, 0)
    ]
    assert errors[0] < errors[1] < errors[2]
    assert 4 * weight.numel() / bct(weight, Statistics(), block=512).nbytes == pytest.approx(
        32 / (4 + 16 / 512)
    )
    assert bct(weight, Statistics()).zeros is None


def divergence(model: Any, exact: torch.Tensor) -> float:
    with torch.no_grad():
        logits = model(input_ids=IDS, use_cache=False).logits.log_softmax(-1)
    return float(torch.nn.functional.kl_div(logits, exact, reduction="sum", log_target=True))


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
def test_blocks_do_less_damage_than_layers_and_nonlinear_parts_do_their_share(family: str) -> None:
    model = build(configurations()[family])
    with torch.no_grad():
        exact = model(input_ids=IDS, use_cache=False).logits.log_softmax(-1)
    found = {}
    for scope in (16, -1):
        for nonlinear in (False, True):
            rounding = partial(fake_quantize_activations, bits=6, group_size=scope)
            with rounded_components(model, rounding, nonlinear=nonlinear):
                found[scope, nonlinear] = divergence(model, exact)
    assert 0 < found[16, False] < found[-1, False]
    assert found[16, True] < found[-1, True]
    assert found[16, False] < found[16, True]
    assert divergence(model, exact) < 1e-3 * found[16, False], "nothing stays behind"


def test_every_component_is_rounded_and_the_head_is_not() -> None:
    model = build(configurations()["llama"])
    shapes: list[torch.Size] = []

    def note(x: torch.Tensor) -> torch.Tensor:
        shapes.append(x.shape)
        return x

    with rounded_components(model, note), torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    layers = 3  # seven multiplies, two norms, a softmax and an activation each
    assert len(shapes) == 1 + layers * (7 + 2 + 1 + 1) + 1
    assert shapes.count(torch.Size([4, 4, 24, 24])) == layers
    assert not any(shape[-1] == 320 for shape in shapes)


def test_coded_models_are_rounded_too() -> None:
    model = build(configurations()["llama"])
    codes: dict[str, Code] = {
        t.name: bct(model.get_parameter(t.parameter).detach(), Statistics(), bits=8)
        for t in find_targets(model)
    }
    others = {n: p.detach() for n, p in model.named_parameters() if n not in codes}
    coded = coded_model(model.config, codes, others)
    with torch.no_grad():
        exact = model(input_ids=IDS, use_cache=False).logits.log_softmax(-1)
    plain = divergence(coded, exact)
    with rounded_components(coded, partial(fake_quantize_activations, bits=8, group_size=16)):
        both = divergence(coded, exact)
    assert 0 < plain < both
