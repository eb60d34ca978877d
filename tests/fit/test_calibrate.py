"""Calibration text that was chosen: what is kept, held out, weighted, and found again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pliant.errors import PliantError
from pliant.fit import Recipe, fit, pipeline, read_recipe
from pliant.fit.calibrate import Pool, choose, read_pool
from pliant.ladder import Artifact
from pliant.model import StreamedModel, open_checkpoint
from pliant.observe import choose_windows, load_text, windows
from tests.fit.tiny import CONTEXT, WORDS, memory, recipe, sums, text


def chosen(**calibration: Any) -> Recipe:
    base = recipe()
    settings = base.calibration.model_dump() | {"candidates": 12} | calibration
    return Recipe.model_validate(base.model_dump() | {"calibration": settings})


def run(source: Path, out: Path, asked: Recipe, **options: Any) -> Artifact:
    budget = memory(open_checkpoint(source).config, 90_000)
    fit(source, budget, out, recipe=asked, context=CONTEXT, **options)
    return Artifact.open(out)


def domain(path: Path, start: int, tokens: int = 1200) -> Path:
    """Text of 40 words from `start` on."""
    path.write_text(" ".join(WORDS[start + (i * i + 3 * i) % 40] for i in range(tokens)))
    return path


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """What each sweep was given: ids and weights."""
    found: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    real = pipeline.Sweep

    def watched(model: Any, ids: torch.Tensor, *args: Any, **options: Any) -> Any:
        found.append((ids, options.get("weights")))
        return real(model, ids, *args, **options)

    monkeypatch.setattr(pipeline, "Sweep", watched)
    return found


@pytest.mark.parametrize(
    ("select", "source"),
    [("medoids", "written"), ("autocoreset", "read"), ("zip_fit", "written"), ("zip_fit", "read")],
)
def test_fit_with_text_that_was_chosen(
    select: str, source: str, llama: Path, tmp_path: Path, seen: list[Any]
) -> None:
    file = text(tmp_path / "text.txt", 1000)
    target = domain(tmp_path / "target.txt", 50, 200) if select == "zip_fit" else None
    asked = chosen(
        select=select,
        text=str(file) if source == "read" else None,
        target=None if target is None else str(target),
    )
    artifact = run(llama, tmp_path / "out", asked)
    assert artifact.provenance["calibration"]["sequences"] == 4
    assert artifact.provenance["calibration"]["select"] == select
    ((ids, weights),) = seen
    assert ids.shape == (4, 24)
    assert len({tuple(row.tolist()) for row in ids}) == 4
    weighted = select in ("medoids", "autocoreset")
    assert (weights is not None) == weighted
    assert weights is None or weights.shape == (4,)
    assert read_recipe(tmp_path / "out" / "recipe.yaml", recipe()) == asked


@pytest.fixture(scope="module")
def whole(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with weighted sequences that was not interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(llama, out, chosen(select="autocoreset"))
    return out


@pytest.mark.parametrize("at", ["writing text", "choosing text", "building rungs"])
def test_interrupted_it_goes_on_to_the_same_bytes(
    at: str, llama: Path, whole: Path, tmp_path: Path
) -> None:
    asked = chosen(select="autocoreset")

    def stop(stage: str, done: int, of: int) -> None:
        if stage == at and done > of // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(llama, tmp_path / "out", asked, progress=stop)
    stages: list[str] = []
    run(llama, tmp_path / "out", asked, progress=lambda stage, done, of: stages.append(stage))
    assert sums(tmp_path / "out") == sums(whole)
    assert ("writing text" in stages) == (at == "writing text"), "candidates are written once"


def test_weights_change_the_rungs(
    llama: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pipeline.Sweep

    def unweighted(*args: Any, **options: Any) -> Any:
        assert len(set(options["weights"].tolist())) > 1
        return real(*args, **options | {"weights": None})

    monkeypatch.setattr(pipeline, "Sweep", unweighted)
    run(llama, tmp_path / "out", chosen(select="autocoreset"))
    name = "block-00000.safetensors"
    assert sums(tmp_path / "out")[name] != sums(whole)[name]


def test_random_text_is_drawn_as_ever(llama: Path, tmp_path: Path) -> None:
    """The same windows as without any choice: measured ladders stay comparable."""
    file = text(tmp_path / "text.txt", 1000)
    asked = chosen(text=str(file))
    model = StreamedModel(open_checkpoint(llama))
    pool = read_pool(asked, model.checkpoint.tokenizer())
    assert pool.ids is not None
    found, weights = choose(model, asked, pool, pool.ids, held_out=1)
    cut = windows(load_text(file), model.checkpoint.tokenizer(), 24)
    assert torch.equal(found, choose_windows(cut, 5, seed=0))
    assert weights is None


def test_what_is_held_out_is_a_random_candidate_and_not_chosen(llama: Path) -> None:
    model = StreamedModel(open_checkpoint(llama))
    ids = torch.randint(3, 300, (13, 24), generator=torch.Generator().manual_seed(0))
    held = []
    for select in ("medoids", "autocoreset"):
        found, weights = choose(model, chosen(select=select), Pool(), ids, held_out=1)
        assert len({tuple(row.tolist()) for row in found}) == len(found) == 5
        assert weights is not None
        assert float(weights[0]) == 1
        assert float(weights[1:].mean()) == pytest.approx(1, abs=1e-5)
        held.append(found[0])
    assert torch.equal(held[0], held[1]), "whatever is chosen, the same text is measured on"


def test_domain_mix_takes_the_targets_domain(llama: Path, tmp_path: Path, seen: list[Any]) -> None:
    """Of three texts, the two that the target is made of; measured on such text as well."""
    files = [domain(tmp_path / f"{start}.txt", start) for start in (0, 100, 200)]
    target = tmp_path / "target.txt"
    parts = [domain(tmp_path / "part", start, 300).read_text() for start in (100, 200)]
    target.write_text(" ".join(parts))
    asked = chosen(
        select="domain_mix", text=[str(f) for f in files], target=str(target), sequences=7,
        candidates=30,
    )  # fmt: skip
    run(llama, tmp_path / "out", asked)
    ids, _ = seen[0]
    words = (ids - 3).float().mean(1)
    assert len(ids) == 7
    assert bool((words > 90).all())
    assert 3 <= int((words > 190).sum()) <= 4
    other = asked.model_copy(
        update={"calibration": asked.calibration.model_copy(update={"target": str(files[0])})}
    )
    run(llama, tmp_path / "other", other)
    assert bool(((seen[1][0] - 3).float().mean(1) < 90).all())


def test_another_target_is_other_work(tmp_path: Path, llama: Path) -> None:
    """What was chosen for one target is not taken up for another of the same name."""
    target = domain(tmp_path / "target.txt", 0, 100)
    asked = chosen(select="zip_fit", target=str(target))
    tokenizer = open_checkpoint(llama).tokenizer()
    first = read_pool(asked, tokenizer).digest()
    domain(tmp_path / "target.txt", 100, 100)
    assert read_pool(asked, tokenizer).digest() not in (first, None)
    assert read_pool(chosen(), tokenizer).digest() is None
    (tmp_path / "target.txt").write_text(" ")
    with pytest.raises(PliantError, match="no text"):
        read_pool(asked, tokenizer)
