"""Evolution within a fit: only what wins on held-out text moves the climb."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from pliant.fit import Recipe, fit, pipeline
from pliant.fit.evolving import _evolve, _Scorer, _unreached
from pliant.fit.recipe import Search
from pliant.ladder import Artifact
from pliant.model import StreamedModel, open_checkpoint
from pliant.observe import Observation
from pliant.plan.climb import Option, prefix
from pliant.plan.evolve import Stage
from tests.fit.tiny import CONTEXT, checkpoint, memory, recipe, sums

BITS = (3.0, 4.5, 6.0)


def asked(generations: int = 2, sequences: int = 1) -> Recipe:
    search = Search(
        measurements=0, sequences=sequences, generations=generations, offspring=4, evolve_bits=BITS
    )
    base = recipe()
    settings = base.calibration.model_copy(update={"sequences": 4 * sequences})
    return base.model_copy(update={"search": search, "calibration": settings})


def run(
    source: Path, out: Path, generations: int = 2, sequences: int = 1, **options: Any
) -> Artifact:
    budget = memory(open_checkpoint(source).config, 90_000)
    fit(source, budget, out, recipe=asked(generations, sequences), context=CONTEXT, **options)
    return Artifact.open(out)


def test_one_climb_through_what_won(llama: Path, tmp_path: Path, monkeypatch: Any) -> None:
    through: list[dict[str, int]] = []
    rungs: list[Any] = []
    real = pipeline.evolve_sizes

    def watched(*args: Any, **options: Any) -> Any:
        rungs.append(args[4])
        through.extend(real(*args, **options))
        return through

    right = Observation.damage

    def wrong(self: Observation, error: torch.Tensor) -> float:
        return right(self, error) * math.exp(random.Random(self.target.name).gauss(0, 2))

    monkeypatch.setattr(Observation, "damage", wrong)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "evolve_sizes", watched)
        artifact = run(llama, tmp_path / "out", 4, 2)
    entries = artifact.provenance["evolved"]
    assert len(entries) == len(BITS)
    used = [entry for entry in entries if entry["used"]]
    assert used, "the climb of wrong predictions is beaten"
    assert len(through) == len(used)
    for entry in entries:
        assert entry["selected"] <= entry["selected_before"]
        assert entry["used"] == (
            "held_out" in entry and entry["held_out"] < entry["held_out_before"]
        )
    for low, high in pairwise(through):
        assert all(low[target] <= high[target] for target in low)
    ladder = artifact.ladder
    sizes = [size for size, _ in ladder.frontier()]
    damages = [damage for _, damage in ladder.frontier()]
    assert sizes == sorted(sizes)
    assert damages == sorted(damages, reverse=True)
    at, passed = dict.fromkeys(ladder.rungs, 0), []
    for step in ladder.climb:
        at[step.target] = step.rung
        passed.append({target: ladder.rungs[target][i].nbytes for target, i in at.items()})
    for allocation, entry in zip(through, used, strict=True):
        own = {target: rungs[0][target][i].nbytes for target, i in allocation.items()}
        assert own in passed, "the climb stands at it"
        assert sum(own.values()) <= entry["nbytes"]
    plain = run(llama, tmp_path / "plain", 0, 2)
    assert plain.provenance["evolved"] == []
    assert {(s.target, s.rung) for s in plain.ladder.climb} == {
        (s.target, s.rung) for s in ladder.climb
    }, "the same moves"
    assert plain.ladder.climb != ladder.climb, "in another order"


def test_interrupted_it_goes_on_to_the_same_bytes(llama: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []

    def note(stage: str, done: int, of: int) -> None:
        if stage == "evolving":
            calls.append((done, of))

    run(llama, tmp_path / "whole", progress=note)
    assert calls == [(i + 1, 6) for i in range(6)]
    for at in (3, 6):

        def stop(stage: str, done: int, of: int, at: int = at) -> None:
            if stage == "evolving" and done == at:
                raise KeyboardInterrupt

        out = tmp_path / f"out-{at}"
        with pytest.raises(KeyboardInterrupt):
            run(llama, out, progress=stop)
        calls.clear()
        run(llama, out, progress=note)
        assert calls[0][0] == 1 + 2 * ((at - 1) // 2), "finished sizes are kept"
        assert sums(out) == sums(tmp_path / "whole")


class Fake:
    """Selects for a target to go up; what is held out may think otherwise."""

    def stages(self) -> list[Stage]:
        return [Stage(1, 1)]

    def score(self, allocation: Mapping[str, int], tokens: int) -> float:
        return 10.0 - allocation["b"]

    def fingerprint(self, allocation: Mapping[str, int]) -> str:
        return str(sorted(allocation.items()))


@pytest.mark.parametrize(("held_out", "used"), [(-1, True), (0, False), (1, False)])
def test_held_out_text_decides(held_out: int, used: bool) -> None:
    options = {name: [Option(10, 4.0), Option(20, 1.0)] for name in "ab"}
    entry = _evolve(
        options, 30, [], Fake(), lambda a: 5.0 + held_out * a["b"], Search(generations=3), 0,
        progress=None,
    )  # fmt: skip
    assert prefix(options, 30) == {"a": 1, "b": 0}
    assert entry["allocation"] == {"a": 0, "b": 1}
    assert entry["selected"] == 9
    assert entry["used"] is used


def test_what_is_not_reached_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    """Two rungs of an expert that the probe does not choose give the same outputs there only."""
    checkpoint(tmp_path / "model", "mixtral", num_local_experts=8)
    model = StreamedModel(open_checkpoint(tmp_path / "model"))
    ids = torch.tensor([[5, 6], [70, 80], [9, 10], [11, 12], [13, 14], [15, 16], [17, 18], [2, 3]])
    silent = _unreached(model, ids[:1])
    experts = sorted(name for name in silent if "experts" in name)
    assert experts
    assert {"model.embed_tokens.weight"} <= silent
    assert not any("self_attn" in name for name in silent)
    scorer = _Scorer(model, ids, lambda allocation: lambda target: None)
    base = dict.fromkeys((t.name for t in model.targets), 0)
    assert scorer.fingerprint(base) == scorer.fingerprint(dict(base))
    assert scorer.fingerprint(base) != scorer.fingerprint(base | {experts[0]: 1})
    reached = next(t.name for t in model.targets if t.name not in silent)
    same = scorer.fingerprint(base | {reached: 1})
    assert same == scorer.fingerprint(base), "reached, and the outputs are the same: one function"
    assert scorer.score(base, ids.numel()) == pytest.approx(0, abs=1e-6)
