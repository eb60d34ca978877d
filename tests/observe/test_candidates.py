"""What is known of each candidate, against the plain model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pliant.errors import PliantError
from pliant.model import StreamedModel, open_checkpoint
from pliant.observe import Candidates, Selection, mean_states, perturbed_losses
from pliant.observe.candidates import check_count
from tests.model.tiny import configurations, save

IDS = torch.randint(3, 320, (5, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, StreamedModel]:
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("candidates")
    model = save(configurations()["llama"], directory)
    return model, StreamedModel(open_checkpoint(directory))


def test_mean_states_are_of_the_last_layer(pair: tuple[Any, StreamedModel]) -> None:
    model, streamed = pair
    with torch.no_grad():
        last: list[torch.Tensor] = []
        hook = model.model.norm.register_forward_pre_hook(lambda _, args: last.append(args[0]))
        model(IDS)
        hook.remove()
    torch.testing.assert_close(mean_states(streamed, IDS), last[0].mean(1), atol=1e-5, rtol=1e-4)


def test_losses_under_the_original_and_under_noisier_copies(
    pair: tuple[Any, StreamedModel],
) -> None:
    model, streamed = pair
    found = perturbed_losses(streamed, IDS, copies=4, seed=2)
    assert found.shape == (5, 5)
    with torch.no_grad():
        logits = model(IDS).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), IDS[:, 1:], reduction="none"
    ).mean(1)
    torch.testing.assert_close(found[:, 0], expected, atol=1e-4, rtol=1e-4)
    change = (found[:, 1:] - found[:, :1]).abs().mean(0)
    assert float(change[0]) > 0
    assert float(change[-1]) > float(change[0]), "more noise, other losses"
    assert torch.equal(found, perturbed_losses(streamed, IDS, copies=4, seed=2))
    assert not torch.equal(found, perturbed_losses(streamed, IDS, copies=4, seed=3))
    assert torch.equal(found[:, 0], perturbed_losses(streamed, IDS, copies=0)[:, 0])


def test_a_selections_weights_have_mean_one() -> None:
    found = Selection.of(torch.tensor([4, 1]), torch.tensor([3, 1]))
    assert found.weights.tolist() == [1.5, 0.5]
    assert Selection.of(torch.tensor([4, 1])).weights.tolist() == [1, 1]
    with pytest.raises(PliantError, match="3 sequences cannot be chosen from 2"):
        check_count(Candidates(torch.zeros(2, 2)), 3)
