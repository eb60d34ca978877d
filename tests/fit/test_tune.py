"""Tuning: the ladder gets closer to the original, its sizes stay what they were."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pliant.errors import PliantError, RecipeError
from pliant.fit import fit, read_recipe
from pliant.fit import tune as tune_module
from pliant.fit.evaluate import Evaluator
from pliant.fit.recipe import Reconstruct, Tune
from pliant.fit.tune import tune
from pliant.ladder import Artifact
from pliant.methods import find
from pliant.methods.latent import latent_of
from pliant.model import Checkpoint, StreamedModel, Target, open_checkpoint
from pliant.observe import Statistics, write_text
from tests.fit.tiny import CONTEXT, memory, recipe, sums


def fitted(llama: Path, tmp_path: Path) -> tuple[Checkpoint, Artifact]:
    """The checkpoint, and an artifact of it without training."""
    checkpoint = open_checkpoint(llama)
    fit(
        llama, memory(checkpoint.config, 90_000), tmp_path / "out", recipe=recipe(), context=CONTEXT
    )
    return checkpoint, Artifact.open(tmp_path / "out")


@pytest.mark.parametrize("scale_bits", [16, 6])
@pytest.mark.parametrize(("method", "bits"), [("rtn", 2), ("rtn", 4), ("bitmod", 3), ("kbit", 3)])
def test_a_latent_starts_as_its_code_and_encodes_what_it_computes(
    method: str, bits: int, scale_bits: int
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(12, 40)
    options = {"bits": bits, "group_size": 16} | (
        {} if method == "kbit" else {"scale_bits": scale_bits}
    )
    start = find(method).function(weight, Statistics(), **options)
    latent = latent_of(start, weight)
    assert latent is not None
    torch.testing.assert_close(latent.weight(), start.decode(), rtol=1e-6, atol=1e-7)
    with torch.no_grad():
        latent.position += 1.5 * torch.randn_like(latent.position)
        latent.log_scale += 0.1 * torch.randn_like(latent.log_scale)
    encoded = latent.encode()
    torch.testing.assert_close(latent.weight(), encoded.decode(), rtol=1e-6, atol=1e-7)
    assert encoded.nbytes == start.nbytes
    assert not torch.equal(encoded.decode(), start.decode())


def test_gradients_pass_straight_through_rounding_and_stop_outside_the_grid() -> None:
    weight = torch.linspace(-1, 1, 32).view(1, 32)
    latent = latent_of(find("rtn").function(weight, Statistics(), bits=2, group_size=16), weight)
    assert latent is not None
    with torch.no_grad():
        latent.position[0, 0, 0] = 7.0
    latent.weight().sum().backward()  # type: ignore[no-untyped-call]
    assert latent.position.grad is not None
    assert latent.log_scale.grad is not None
    scales = latent.log_scale.exp()
    assert latent.position.grad[0, 0, 0] == 0
    torch.testing.assert_close(latent.position.grad[0, 0, 1], scales[0, 0], rtol=0.02, atol=0)
    assert latent.log_scale.grad.abs().min() > 0


def test_the_rate_of_integers_falls_with_their_width() -> None:
    settings = Tune(rate=8e-3, rate_fall=1.5)
    assert [settings.rate_of(bits) for bits in (1, 2, 4)] == [8e-3, 8e-3, 1e-3]
    assert Tune().rate_of(8) == Tune().rate


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_pass_gives_the_gradients_of_one_that_is_not(
    llama: Path, tmp_path: Path
) -> None:
    checkpoint, artifact = fitted(llama, tmp_path)
    model = StreamedModel(checkpoint, resident=True, device="cuda")
    student = tune_module._Student(model, artifact.ladder, artifact.load_code, {})
    student.go_to(artifact.ladder.smallest_bytes)
    ids = torch.randint(0, 64, (4, 32))
    hidden = model.capture(ids)
    gradients = []
    for alone in (True, False):  # what is alone is captured, on its first call
        student._graph = None
        for leaf in student._leaves.values():
            leaf.grad = None
        student.run(ids, hidden, 1.0, alone=alone)
        assert (student._graph is not None) == alone
        gradients.append({n: leaf.grad.clone() for n, leaf in student._leaves.items()})
    for name, captured in gradients[0].items():
        torch.testing.assert_close(captured, gradients[1][name], rtol=0.02, atol=1e-6)


def test_tuning_lowers_damage_at_every_size_and_changes_no_size(
    llama: Path, tmp_path: Path
) -> None:
    checkpoint, artifact = fitted(llama, tmp_path)
    model = StreamedModel(checkpoint, resident=True)
    ids = write_text(model, 80, 32, seed=3)
    settings = Tune(steps=80, batch=16, at_once=8, rate=1e-2, scale_rate=5e-3, bits=(0.0, 16.0))
    tuned = tune(model, artifact.ladder, artifact.load_code, ids[:64], settings)
    assert tuned

    def after(target: str, index: int) -> object:
        return tuned.get((target, index)) or artifact.load_code(target, index)

    evaluator = Evaluator(model, ids[64:])  # text that tuning has not seen
    ladder = artifact.ladder
    low, high = ladder.smallest_bytes, ladder.largest_bytes
    for size in (low, (5 * low + high) // 6):
        allocation = ladder.allocation(size)

        def at(load: object, chosen: dict[str, int] = allocation) -> float:
            def code_of(target: Target) -> object:
                return load(target.name, chosen[target.name])  # type: ignore[operator]

            return evaluator.damage(code_of)  # type: ignore[arg-type]

        assert at(after) < 0.95 * at(artifact.load_code)
    for (target, index), made in tuned.items():
        assert made.nbytes == artifact.load_code(target, index).nbytes


class Stop(Exception):
    pass


def test_an_interrupted_training_goes_on_and_gives_the_same_bytes(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Tune(steps=12, sequences=16, batch=8, at_once=8, bits=(0.0, 16.0))
    trained = recipe().model_copy(update={"tune": settings})
    config = open_checkpoint(llama).config
    options = {"recipe": trained, "context": CONTEXT}
    fit(llama, memory(config, 90_000), tmp_path / "whole", **options)

    def interrupt(stage: str, done: int, of: int) -> None:
        if stage == "training" and done == 7:
            raise Stop

    monkeypatch.setattr(tune_module, "_SAVE_SECONDS", 0.0)
    with pytest.raises(Stop):
        fit(llama, memory(config, 90_000), tmp_path / "cut", **options, progress=interrupt)
    done: list[int] = []
    fit(
        llama, memory(config, 90_000), tmp_path / "cut", **options,
        progress=lambda stage, d, of: done.append(d) if stage == "training" else None,
    )  # fmt: skip
    assert done[0] == 7, "the seventh step was not saved when the run was cut in it"
    assert sums(tmp_path / "cut") == sums(tmp_path / "whole")
    fit(llama, memory(config, 90_000), tmp_path / "plain", recipe=recipe(), context=CONTEXT)
    assert sums(tmp_path / "plain") != sums(tmp_path / "whole")


def test_reconstruction_is_a_stage_that_changes_integers_and_no_bytes(
    llama: Path, tmp_path: Path
) -> None:
    config = open_checkpoint(llama).config
    settings = Reconstruct(method="cbq", options={"steps": 4})
    rebuilt = recipe().model_copy(update={"reconstruct": settings})
    for name, chosen in (("plain", recipe()), ("rebuilt", rebuilt)):
        fit(llama, memory(config, 90_000), tmp_path / name, recipe=chosen, context=CONTEXT)
    plain, better = Artifact.open(tmp_path / "plain"), Artifact.open(tmp_path / "rebuilt")
    assert better.ladder.smallest_bytes == plain.ladder.smallest_bytes
    first = [next(iter(own)) for own in better.ladder.rungs.values()]
    assert any(rung.where.shard.startswith("rebuilt-") for rung in first)
    path = tmp_path / "wrong.yaml"
    path.write_text("reconstruct: {method: gptq}")
    with pytest.raises(RecipeError, match="not to reconstruct"):
        read_recipe(path, recipe())


def test_too_little_text_to_tune_on_is_said(llama: Path, tmp_path: Path) -> None:
    checkpoint, artifact = fitted(llama, tmp_path)
    model = StreamedModel(checkpoint, resident=True)
    with pytest.raises(PliantError, match="16 sequences a step; the text has 3"):
        tune(model, artifact.ladder, artifact.load_code, torch.zeros(3, 8, dtype=torch.long),
             Tune(steps=1))  # fmt: skip
