import pytest
import torch

from pliant.bench import artifacts, bench_artifact, bench_kernels, kernels
from pliant.bench.artifacts import openings
from pliant.bench.samples import COMMON
from pliant.errors import BudgetError
from pliant.ladder import Artifact
from pliant.measure.speed import Speed
from pliant.plan import Bandwidth

from ..ladder.tiny import write_artifact
from ..timings import LAYER, POSITION, product_seconds

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_artifact(tmp_path_factory.mktemp("artifacts") / "tiny")


@pytest.fixture(autouse=True)
def memory_of_a_gigabyte(monkeypatch):
    for place in (artifacts, kernels):
        monkeypatch.setattr(place, "bandwidth", lambda device, refresh: Bandwidth("imagined", 1e9))


def pace(model, prompt, answer, repeats):
    return Speed(prefill_tps=1000.0, decode_tps=1e6 / model.plan.weight_bytes)


def test_sizes_are_measured_and_predicted(directory, machine):
    artifact = Artifact.open(directory)
    low, high = artifact.ladder.smallest_bytes, artifact.ladder.largest_bytes
    told = []
    found = bench_artifact(
        directory, weights=[high, low, str(high)], pace=pace, progress=lambda *a: told.append(a)
    )
    assert [row["weight_bytes"] for row in found["rows"]] == [low, high]
    assert told[-1] == ("sizes", 2, 2)
    position = found["prompt_tokens"] + found["new_tokens"] // 2
    for row, allocation in zip(
        found["rows"], (dict.fromkeys(artifact.ladder.rungs, 0), artifact.ladder.top()), strict=True
    ):
        codes = [artifact.load_code(name, index) for name, index in allocation.items()]
        seconds = sum(map(product_seconds, codes)) + 2 * (LAYER + POSITION * position)
        assert row["predicted_tps"] == pytest.approx(1 / seconds)
        assert row["decode_tps"] == 1e6 / row["weight_bytes"]
        cache = position * 2 * 2 * 2 * 16 * 2  # layers, keys and values, heads, numbers, bytes
        assert row["token_bytes"] == row["weight_bytes"] + cache
        assert row["bytes_per_second"] == row["token_bytes"] * row["decode_tps"]
        assert row["share"] == row["bytes_per_second"] / 1e9


def test_without_sizes_the_ends_and_a_middle_are_taken(directory):
    artifact = Artifact.open(directory)
    sizes = [plan.weight_bytes for plan in openings(artifact, (), (), quick=False)]
    assert len(sizes) == 3
    assert (sizes[0], sizes[-1]) == (artifact.ladder.smallest_bytes, artifact.ladder.largest_bytes)
    (fitted,) = openings(artifact, (), (), quick=True)
    assert fitted.memory == artifact.budget.memory
    with pytest.raises(BudgetError, match="smallest"):
        openings(artifact, ["1MiB", "1KiB"], (), quick=False)


def test_kernels_are_held_against_the_memory(monkeypatch):
    monkeypatch.setattr(kernels, "beyond_cache", lambda device: 1 << 14)

    def timer(codes, x, seconds):
        assert sum(code.nbytes for code in codes) >= 1 << 14
        return x.shape[0] * codes[0].nbytes / 5e8

    told = []
    found = bench_kernels(
        CPU, shapes=[(64, 128), (32, 64)], batches=[1, 8], timer=timer,
        progress=lambda *a: told.append(a),
    )  # fmt: skip
    assert len(found["rows"]) == 4 * len(COMMON)
    assert told[-1] == (4 * len(COMMON), 4 * len(COMMON))
    for row in found["rows"]:
        assert row["share"] == pytest.approx(0.5 / row["batch"])
        assert row["bits"] == 8 * row["nbytes"] / (row["shape"][0] * row["shape"][1])
