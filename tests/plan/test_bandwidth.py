import json
import sys

import pytest
import torch

from pliant.plan import bandwidth as package_function
from pliant.plan.bandwidth import bandwidth, processor_name


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PLIANT_CACHE", str(tmp_path))
    return tmp_path


def test_it_is_measured_once_and_kept(own_cache, monkeypatch):
    first = bandwidth("cpu")
    assert 1e8 < first.bytes_per_second < 1e13
    monkeypatch.setattr("torch.Tensor.sum", None)  # a second measurement would fail
    assert bandwidth("cpu") == first == package_function("cpu")
    stored = json.loads((own_cache / "bandwidth.json").read_text())
    assert stored == {processor_name(torch.device("cpu")): first.bytes_per_second}


def test_a_damaged_cache_is_measured_again(own_cache):
    (own_cache / "bandwidth.json").write_text("{not json")
    assert bandwidth("cpu").bytes_per_second > 0
    assert json.loads((own_cache / "bandwidth.json").read_text())


def test_a_cache_that_cannot_be_written_costs_only_time(own_cache, monkeypatch):
    (own_cache / "file").write_text("")
    monkeypatch.setenv("PLIANT_CACHE", str(own_cache / "file" / "below"))
    assert bandwidth("cpu").bytes_per_second > 0


def test_measuring_again_keeps_what_the_machine_could_do(monkeypatch):
    module = sys.modules["pliant.plan.bandwidth"]
    for measured, kept in ((2e10, 2e10), (5e9, 2e10), (4e10, 4e10)):
        monkeypatch.setattr(module, "_measure", lambda place, measured=measured: measured)
        assert bandwidth("cpu", refresh=True).bytes_per_second == kept
