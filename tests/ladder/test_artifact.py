"""Opening checks what it must, reads what it needs, and says what is wrong."""

from __future__ import annotations

import hashlib
import json
import os

import pytest
import torch

from pliant.errors import CorruptError, PliantError
from pliant.ladder import Artifact
from pliant.ladder import artifact as artifact_module


def flip(path, position):
    raw = bytearray(path.read_bytes())
    raw[position] ^= 4
    path.write_bytes(raw)


def test_bytes_of_an_allocation_are_the_bytes_of_its_tensors(tiny):
    artifact = Artifact.open(tiny)
    for asked in range(artifact.ladder.smallest_bytes, artifact.ladder.largest_bytes, 9_999):
        allocation = artifact.ladder.allocation(asked)
        codes = artifact.load_codes(allocation)
        tensors = [t for code in codes.values() for t in code.tensors().values()]
        tensors += artifact.load_fixed().values()
        assert sum(t.nbytes for t in tensors) == artifact.ladder.bytes_of(allocation) <= asked


def test_an_artifact_says_what_it_was_made_from(tiny):
    artifact = Artifact.open(tiny)
    artifact.verify()
    assert artifact.budget.context == 64
    assert artifact.recipe == {"seed": 0}
    assert artifact.provenance == {"source": "tiny"}
    assert artifact.config().hidden_size == 64
    assert {t["name"] for t in artifact.targets} == set(artifact.ladder.rungs)


def test_rungs_that_are_not_used_are_not_read(mine, monkeypatch):
    artifact = Artifact.open(mine)
    for rungs in artifact.ladder.rungs.values():
        flip(mine / rungs[2].where.shard, rungs[2].where.start)
    read = []
    real = artifact_module.read_extent
    monkeypatch.setattr(
        artifact_module, "read_extent", lambda d, e: read.append(e.nbytes) or real(d, e)
    )
    allocation = dict.fromkeys(artifact.ladder.rungs, 0)
    artifact.load_codes(allocation)
    artifact.load_fixed()
    assert sum(read) == artifact.ladder.smallest_bytes
    with pytest.raises(CorruptError, match="damaged"):
        artifact.load_code(next(iter(allocation)), 2)
    with pytest.raises(CorruptError, match="checksum"):
        artifact.verify()


def test_a_missing_directory_and_a_strange_one(tmp_path):
    with pytest.raises(PliantError, match="no directory"):
        Artifact.open(tmp_path / "nowhere")
    with pytest.raises(PliantError, match=r"not a Pliant artifact"):
        Artifact.open(tmp_path)


def test_a_truncated_shard_is_named(mine):
    path = mine / "block-00001.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CorruptError, match=r"block-00001\.safetensors is truncated.*fit it again"):
        Artifact.open(mine)
    path.unlink()
    with pytest.raises(CorruptError, match=r"block-00001\.safetensors is missing"):
        Artifact.open(mine)


def test_a_flipped_byte_in_a_used_rung(mine):
    artifact = Artifact.open(mine)
    rung = artifact.ladder.rungs["model.layers.0.mlp.down_proj.weight"][0]
    flip(mine / rung.where.shard, rung.where.stop - 1)
    with pytest.raises(CorruptError, match=r"block-00000.*layers\.0\.mlp\.down_proj"):
        artifact.load_codes(dict.fromkeys(artifact.ladder.rungs, 0))
    with pytest.raises(CorruptError, match="block-00000"):
        artifact.verify()


def test_a_flipped_byte_in_a_header(mine):
    flip(mine / "outer.safetensors", 40)
    with pytest.raises(CorruptError, match=r"header of .*outer\.safetensors"):
        Artifact.open(mine)


@pytest.mark.parametrize("position", range(5, 4000, 333))
def test_a_flipped_byte_in_ladder_json(mine, position):
    flip(mine / "ladder.json", position)
    with pytest.raises(CorruptError, match=r"ladder\.json"):
        Artifact.open(mine)


def sealed(fields) -> bytes:
    body = json.dumps(fields)[1:].encode()
    return b'{"sha256":"' + hashlib.sha256(body).hexdigest().encode() + b'",' + body


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "version 99"),
        ({"format": "other"}, "'other'"),
        ({"climb": [{"target": "nobody", "rung": 1, "damage": 0.0}]}, "nobody"),
        ({"climb": 3}, "climb"),
        ({"shards": {}}, "place on disk"),
    ],
)
def test_a_ladder_json_of_another_kind(mine, change, message):
    fields = json.loads((mine / "ladder.json").read_bytes())
    del fields["sha256"]
    (mine / "ladder.json").write_bytes(sealed({**fields, **change}))
    with pytest.raises(CorruptError, match=message):
        Artifact.open(mine).ladder  # noqa: B018


def test_a_damaged_configuration_and_unknown_names(mine):
    artifact = Artifact.open(mine)
    with pytest.raises(PliantError, match="no target called"):
        artifact.load_code("nobody", 0)
    with pytest.raises(PliantError, match="rungs 0 to 2"):
        artifact.load_code("model.layers.0.mlp.down_proj.weight", 3)
    (mine / "config.json").write_text("{")
    with pytest.raises(CorruptError, match=r"config\.json"):
        artifact.config()


def test_a_code_frees_its_memory(tiny):
    artifact = Artifact.open(tiny)
    name = "model.layers.0.mlp.down_proj.weight"
    code = artifact.load_code(name, 1)
    storages = {t.untyped_storage().data_ptr() for t in code.tensors().values()}
    assert len(storages) == 1
    assert all(isinstance(t, torch.Tensor) for t in code.tensors().values())
