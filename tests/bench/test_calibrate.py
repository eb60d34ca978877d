import json

import pytest
import torch
from transformers import LlamaConfig

from pliant.bench import calibrate
from pliant.bench.calibrate import (
    MODULES,
    STEP,
    costs_of_artifact,
    costs_of_config,
    products_of_artifact,
    products_of_config,
)
from pliant.bench.samples import COMMON, group_int, with_low_rank
from pliant.bench.stand_in import StandIn, stand_in_layers
from pliant.kernels.cpu.structs import Unsuited, describe
from pliant.ladder import Artifact
from pliant.plan.speed import Product, kind_of

from ..ladder.tiny import tiny_config, write_artifact
from ..timings import LAYER, POSITION, product_seconds

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return Artifact.open(write_artifact(tmp_path_factory.mktemp("artifacts") / "tiny"))


def codes_of(artifact, allocation):
    return [artifact.load_code(name, index) for name, index in allocation.items()]


def test_every_size_is_predicted_from_products_timed_once(artifact, machine):
    costs = costs_of_artifact(artifact)
    assert "token" in machine.timed
    ladder = artifact.ladder
    low, high = ladder.smallest_bytes, ladder.largest_bytes
    for size in (low, (low + high) // 2, high):
        allocation = ladder.allocation(size)
        expected = sum(map(product_seconds, codes_of(artifact, allocation)))
        expected += 2 * (LAYER + POSITION * 40)
        found = costs.seconds(products_of_artifact(artifact, allocation), 40)
        assert found == pytest.approx(expected, rel=1e-6)


def test_what_is_known_is_not_timed_again(artifact, machine, tmp_path, monkeypatch):
    first = costs_of_artifact(artifact)
    machine.timed.clear()
    assert costs_of_artifact(artifact) == first
    assert not machine.timed
    kinds = len(first.ways[STEP][0])
    costs_of_config(tiny_config(), ["int3"])  # another kind: its products and no more
    assert "token" not in machine.timed
    assert STEP in machine.timed
    shapes = {(p.out, p.width) for p in products_of_config(tiny_config(), "int3")}
    kept = json.loads((tmp_path / "speed.json").read_text())
    (entry,) = kept.values()
    assert len(entry["products"][STEP]) == kinds + len(shapes)


def test_what_changes_the_speed_is_timed_again(artifact, machine, monkeypatch):
    costs_of_artifact(artifact)
    for change in (
        lambda: monkeypatch.setenv("PLIANT_NATIVE", "int8"),
        lambda: monkeypatch.setattr(calibrate, "processor_name", lambda device: "another"),
        lambda: monkeypatch.setattr(calibrate, "kernels_version", lambda: "newer"),
    ):
        machine.timed.clear()
        change()
        costs_of_artifact(artifact)
        assert "token" in machine.timed
        assert STEP in machine.timed


def test_all_is_timed_again_on_demand(artifact, machine):
    costs_of_artifact(artifact)
    first = list(machine.timed)
    machine.timed.clear()
    costs_of_artifact(artifact, refresh=True)
    assert machine.timed == first


def test_a_cache_that_says_something_else_is_ignored(artifact, machine, tmp_path):
    first = costs_of_artifact(artifact)
    path = tmp_path / "speed.json"
    for text in ("[]", "{not json", json.dumps(dict.fromkeys(json.loads(path.read_text()), 3))):
        path.write_text(text)
        assert costs_of_artifact(artifact) == first


def test_a_burst_of_other_work_does_not_spoil_a_figure(machine):
    met = set()

    def timer(codes, x, seconds):
        burst = codes[0].shape not in met
        met.add(codes[0].shape)
        return product_seconds(codes[0], 7.0 if burst else 1.0)

    products = products_of_config(tiny_config(), "int5")
    sources = {p: calibrate._sample_source(COMMON["int5"], p) for p in products}
    noisy = calibrate.calibrate(
        tiny_config(), sources, CPU, timers={STEP: timer, MODULES: timer},
        stand_in=machine.stand_in,
    )  # fmt: skip
    quiet = sum(product_seconds(COMMON["int5"](p.out, p.width)) for p in products)
    assert noisy.seconds(products, 0) == pytest.approx(quiet + 2 * LAYER, rel=1e-6)


def test_a_code_that_the_step_does_not_know_makes_the_model_run_by_modules(machine):
    with pytest.raises(Unsuited):
        describe(with_low_rank(64, 64))
    costs = costs_of_config(tiny_config(), ["int4", "int4 + rank 32"])
    step, modules = (
        costs.seconds(products_of_config(tiny_config(), kind), 0)
        for kind in ("int4", "int4 + rank 32")
    )
    sums = [product_seconds(COMMON["int4"](p.out, p.width))
            for p in products_of_config(tiny_config(), "int4")]  # fmt: skip
    assert step == pytest.approx(sum(sums) + 2 * LAYER, rel=1e-6)
    assert modules > 2 * step - 2 * LAYER


def test_several_sequences_run_by_modules(machine):
    costs = costs_of_config(tiny_config(), ["int4"], batch=4)
    assert list(costs.ways) == [MODULES]


def test_a_huge_matrix_is_timed_by_some_of_its_rows(machine):
    product = Product(kind_of(group_int(64, 64).meta()), 1 << 20, 1024)
    code = calibrate._sample_source(group_int, product)()
    assert code.shape == (1 << 13, 1024)
    took = calibrate._measure(
        product, lambda: code, STEP, 1, CPU, 0.1, lambda codes, x, s: product_seconds(codes[0])
    )
    assert took == pytest.approx(128 * product_seconds(code))


def test_no_prediction_where_a_few_layers_do_not_fit(machine, monkeypatch):
    class Memory:
        available = 1000

    monkeypatch.setattr(calibrate.psutil, "virtual_memory", Memory)
    assert costs_of_config(tiny_config(), ["int4"]) is None


def test_progress_reaches_its_end(artifact, machine):
    told = []
    costs_of_artifact(artifact, progress=lambda done, of: told.append((done, of)))
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1]


def test_what_a_token_takes_once_is_not_taken_for_every_layer(machine, monkeypatch):
    """From models of one and two layers, for one of six."""
    monkeypatch.setattr(calibrate, "beyond_cache", lambda device: 1)
    machine.token = 5 * LAYER
    config = tiny_config()
    config.num_hidden_layers = 6
    products = products_of_config(config, "int4")
    expected = sum(product_seconds(COMMON["int4"](p.out, p.width)) for p in products)
    expected += machine.token + 6 * (LAYER + POSITION * 40)
    found = costs_of_config(config, ["int4"])
    assert found.seconds(products, 40) == pytest.approx(expected, rel=1e-6)
    machine.timed.clear()
    assert costs_of_config(config, ["int4"]) == found
    assert not machine.timed


def test_a_stand_in_has_the_layers_that_fill_the_memory_asked_for():
    config = tiny_config()
    config.num_hidden_layers = 6
    layer = (2 * 64 * 64 + 3 * 64 * 128) // 2  # bytes at 4 bits; k and v are no targets, too thin
    assert stand_in_layers(config, 1) == [1, 2]
    assert stand_in_layers(config, 3 * layer) == [1, 3]
    assert stand_in_layers(config, 5 * layer) == [2, 5]
    assert stand_in_layers(config, 100 * layer) == [6]
    cut = calibrate.with_layers(config, 2)
    assert (cut.num_hidden_layers, config.num_hidden_layers) == (2, 6)


def test_a_stand_in_runs_its_model_both_ways():
    made = StandIn(tiny_config(), 1, CPU)
    for step in (True, False) if made.takes_step() else (False,):
        times = made.seconds(step, 0.0)
        assert len(times) == 2
        assert all(seconds > 0 for seconds in times.values())


def test_a_model_that_the_step_does_not_know_has_no_time_in_it():
    config = LlamaConfig(**{**tiny_config().to_dict(), "hidden_act": "gelu"})
    assert StandIn(config, 1, CPU).seconds(True, 0.0) is None


@pytest.mark.parametrize("name", COMMON)
def test_samples_are_the_codes_that_their_names_say(name):
    code = COMMON[name](96, 192)
    assert code.shape == (96, 192)
    assert torch.isfinite(code.decode()).all()
    bits = 16 if name == "bf16" else int(name.split()[0][-1])
    assert bits <= code.bits < bits + (10 if "rank" in name else 1)


def test_this_machine_can_be_measured(artifact, monkeypatch, tmp_path):
    monkeypatch.setattr(calibrate, "_FILE", str(tmp_path / "speed.json"))
    monkeypatch.setattr(calibrate, "_ROUNDS", 1)
    monkeypatch.setattr(calibrate, "copies", lambda code, nbytes: [code, code])
    products = products_of_artifact(artifact, artifact.ladder.top())
    first = costs_of_artifact(artifact, seconds=0.0)
    assert first.seconds(products, 8) is not None
    monkeypatch.setattr(calibrate, "StandIn", None)  # another measurement would fail
    assert costs_of_artifact(artifact, seconds=0.0) == first


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_tokens_are_predicted_as_a_graph(artifact, monkeypatch, tmp_path):
    monkeypatch.setenv("PLIANT_CACHE", str(tmp_path))
    monkeypatch.setenv("PLIANT_GPU_KERNELS", "1")
    costs = costs_of_artifact(artifact, "cuda", seconds=0.001)
    assert list(costs.ways) == [STEP]
    products, _ = costs.ways[STEP]
    allocation = artifact.ladder.allocation(artifact.ladder.largest_bytes)
    wanted = products_of_artifact(artifact, allocation)
    assert all(products[product.key] > 0 for product in wanted)
    monkeypatch.delenv("PLIANT_GPU_KERNELS")
    assert list(costs_of_artifact(artifact, "cuda", seconds=0.001).ways) == [MODULES]
