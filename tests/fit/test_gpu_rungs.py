"""A GPU makes rungs as good as a CPU's, alone and in a fit, whose layers are built side by side."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pliant.fit import default_recipe, fit
from pliant.fit.recipe import RungSpec
from pliant.ladder import Artifact
from pliant.methods import find
from pliant.methods.numerics import weighted_error
from pliant.model import StreamedModel, open_checkpoint
from pliant.observe import Statistics
from tests.fit.tiny import CONTEXT, memory, recipe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SPECS = default_recipe("best", gpu=True).rules[0].rungs


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.method} {dict(s.options)}")
@pytest.mark.parametrize("shape", [(192, 576), (96, 1536)])
def test_a_rung_is_as_near_as_on_a_cpu(spec: RungSpec, shape: tuple[int, int]) -> None:
    """Wider than what a launch rounds, of inputs that are correlated and unlike in size."""
    out, width = shape
    generator = torch.Generator().manual_seed(width)
    weight = torch.randn(out, width, generator=generator) * 0.02
    mixed = torch.randn(2048, 200, generator=generator) @ torch.randn(
        200, width, generator=generator
    )
    x = (mixed / 14 + torch.randn(2048, width, generator=generator)) * torch.exp(
        torch.randn(width, generator=generator) * 0.7
    )
    moment = x.t() @ x / len(x)
    errors = []
    for device in ("cpu", "cuda"):
        statistics = Statistics(tokens=len(x), second_moment=moment.to(device))
        options = find(spec.method).options | dict(spec.options)
        code = find(spec.method).function(weight.to(device), statistics, **options)
        errors.append(float(weighted_error(code.to("cpu").decode() - weight, moment)))
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


def test_a_fit_makes_the_rungs_that_a_cpu_makes(llama: Path, tmp_path: Path) -> None:
    config = open_checkpoint(llama).config
    made = {}
    for device in ("cpu", "cuda"):
        fit(llama, memory(config, 90_000), tmp_path / device, recipe=recipe(), context=CONTEXT,
            device=device)  # fmt: skip
        made[device] = Artifact.open(tmp_path / device)
    model = StreamedModel(open_checkpoint(llama), resident=True)
    compared = 0
    for target in model.targets:
        weight = model.weight(target)
        errors: dict[str, dict[int, float]] = {}
        for device, artifact in made.items():
            own = errors[device] = {}
            for rung in artifact.ladder.rungs[target.name]:
                decoded = artifact.load_code(target.name, rung.index).decode()
                own[rung.nbytes] = float((decoded - weight).norm() / weight.norm())
        for nbytes in errors["cpu"].keys() & errors["cuda"].keys():
            assert errors["cuda"][nbytes] == pytest.approx(errors["cpu"][nbytes], rel=0.05)
            compared += 1
    assert compared > len(model.targets)
