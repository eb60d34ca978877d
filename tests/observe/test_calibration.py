"""Calibration text: the same seed writes the same words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pliant.errors import PliantError
from pliant.model import StreamedModel, open_checkpoint
from pliant.observe import choose_windows, digest, write_text
from tests.model.tiny import configurations, save

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> StreamedModel:
    directory = tmp_path_factory.mktemp("model")
    save(configurations()["llama"], directory)
    return StreamedModel(open_checkpoint(directory), resident=True)


def test_a_seed_decides_the_text(model: StreamedModel) -> None:
    first = write_text(model, 5, 12, seed=3)
    assert first.shape == (5, 12)
    assert first.dtype == torch.long
    assert torch.equal(write_text(model, 5, 12, seed=3), first)
    torch.manual_seed(77)  # the global generator has no say
    assert torch.equal(write_text(model, 5, 12, seed=3), first)
    assert not torch.equal(write_text(model, 5, 12, seed=4), first)
    assert 0 <= int(first.min()) <= int(first.max()) < 320


def test_every_sequence_starts_a_document(model: StreamedModel) -> None:
    starts = write_text(model, 6, 3, seed=0)[:, 0]
    assert (starts == model.config.bos_token_id).all()


def test_without_a_beginning_token_the_first_ones_are_drawn(model: StreamedModel) -> None:
    kept, model.config.bos_token_id = model.config.bos_token_id, None
    try:
        starts = write_text(model, 6, 3, seed=0)[:, 0]
    finally:
        model.config.bos_token_id = kept
    assert len(set(starts.tolist())) > 1


def test_sequences_go_on_from_their_prompts(model: StreamedModel) -> None:
    prompts = torch.arange(15).view(3, 5) + 7
    found = write_text(model, 4, 9, seed=3, prompts=prompts)
    assert torch.equal(found[:3, :5], prompts)
    assert found[3, 0] == model.config.bos_token_id
    alone = write_text(model, 4, 9, seed=3)
    assert not torch.equal(found[:3, 5:], alone[:3, 5:])
    assert len(set(found[:3, 5].tolist())) > 1


def test_text_is_what_the_model_would_say(model: StreamedModel) -> None:
    """Likelier under the model than random tokens: it was sampled from it, with the cache."""

    def likelihood(ids: torch.Tensor) -> float:
        scores = model.logits(ids)[:, :-1].log_softmax(-1)
        return float(scores.gather(-1, ids[:, 1:, None]).mean())

    written = write_text(model, 8, 24)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(320, (8, 24), generator=generator)
    assert likelihood(written) > likelihood(noise) + 0.3


def test_progress_and_a_single_token(model: StreamedModel) -> None:
    seen: list[tuple[int, int]] = []
    write_text(model, 1, 4, progress=lambda done, of: seen.append((done, of)))
    assert seen == [(2, 4), (3, 4), (4, 4)]
    assert write_text(model, 3, 1).shape == (3, 1)


def test_a_model_that_is_not_resident_is_refused(model: StreamedModel) -> None:
    streamed = StreamedModel(model.checkpoint)
    with pytest.raises(PliantError, match="--text"):
        write_text(streamed, 1, 4)


def test_without_a_beginning_of_text_token(tmp_path: Path) -> None:
    config = configurations()["llama"]
    config.bos_token_id = None
    save(config, tmp_path)
    model = StreamedModel(open_checkpoint(tmp_path), resident=True)
    assert len(set(write_text(model, 8, 1)[:, 0].tolist())) > 4


def test_windows_are_drawn_without_replacement() -> None:
    windows = torch.arange(40).view(10, 4)
    chosen = choose_windows(windows, 6, seed=1)
    assert torch.equal(chosen, choose_windows(windows, 6, seed=1))
    assert not torch.equal(chosen, choose_windows(windows, 6, seed=2))
    rows = [tuple(row) for row in chosen.tolist()]
    assert len(set(rows)) == 6
    assert set(rows) <= {tuple(row) for row in windows.tolist()}
    everything = choose_windows(windows, 99)
    assert sorted(everything.tolist()) == windows.tolist()


def test_digest_tells_texts_apart_and_not_their_storage() -> None:
    ids = torch.arange(12).view(3, 4)
    assert digest(ids) == digest(ids.to(torch.int32))
    assert digest(ids) == digest(ids.t().contiguous().t())
    assert digest(ids) != digest(ids + 1)
    assert len(digest(ids)) == 16
