"""The text that a ladder is trained on."""

from __future__ import annotations

from pathlib import Path

import torch

from pliant.fit.recipe import Recipe, Tune
from pliant.fit.training import cut_prompts, training_text
from pliant.model import StreamedModel, open_checkpoint
from tests.model.tiny import configurations, save

torch.set_num_threads(1)


def test_prompts_are_pieces_of_the_text() -> None:
    text = torch.arange(60).view(3, 20)
    found = cut_prompts(text, 40, 6, seed=1)
    assert found is not None
    assert found.shape == (40, 6)
    assert bool((found.diff(dim=1) == 1).all())  # neighbours in the text
    assert bool((found[:, 0] // 20 == found[:, -1] // 20).all())  # of one sequence
    assert len(set(found[:, 0].tolist())) > 20
    assert torch.equal(found, cut_prompts(text, 40, 6, seed=1))
    whole = cut_prompts(text, 2, 99, seed=0)
    assert whole is not None
    assert whole.shape == (2, 20)
    assert cut_prompts(text[:0], 4, 6, seed=1) is None
    assert cut_prompts(text, 4, 0, seed=1) is None


def test_half_of_the_sequences_go_on_from_the_users_text(tmp_path: Path) -> None:
    save(configurations()["llama"], tmp_path / "model")
    model = StreamedModel(open_checkpoint(tmp_path / "model"), resident=True)
    own = torch.randint(320, (5, 16), generator=torch.Generator().manual_seed(0))
    base = Recipe()
    recipe = base.model_copy(
        update={
            "calibration": base.calibration.model_copy(update={"length": 16}),
            "tune": Tune(steps=1, sequences=6, prompt=4),
        }
    )
    (tmp_path / "work").mkdir()
    told: list[int] = []
    ids = training_text(
        model, recipe, own, tmp_path / "work", lambda _, done, of: told.append(done)
    )
    assert torch.equal(ids[:5], own)
    pieces = {tuple(row[at : at + 4].tolist()) for row in own for at in range(13)}
    begins = [tuple(row[:4].tolist()) in pieces for row in ids[5:]]
    assert begins == [True] * 3 + [False] * 3
    assert told == [6]
    again = training_text(model, recipe, own[:0], tmp_path / "work", lambda *_: None)
    assert torch.equal(again, ids)  # kept for a run that goes on
