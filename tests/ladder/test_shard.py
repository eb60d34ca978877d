"""Shards are safetensors files, read in parts that are checked."""

from __future__ import annotations

from threading import Event

import pytest
import torch
from safetensors.torch import load_file

from pliant.errors import CorruptError
from pliant.ladder import shard
from pliant.ladder.shard import (
    check_extent,
    copy_extents,
    read_extent,
    write_shard,
)

GROUPS = [
    ("a@0.", {"q": torch.arange(13, dtype=torch.uint8), "s": torch.randn(3, 2).half()}),
    ("a@1.", {"q": torch.randn(5), "i": torch.arange(3), "empty": torch.zeros(0, 4).bfloat16()}),
    ("b@0.", {"flag": torch.tensor([True, False]), "scalar": torch.tensor(2.5)}),
]


def test_groups_come_back_bit_for_bit(tmp_path):
    info, extents = write_shard(tmp_path / "x.safetensors", GROUPS)
    assert (tmp_path / "x.safetensors").stat().st_size == info.nbytes
    for (_, tensors), extent in zip(GROUPS, extents, strict=True):
        found = read_extent(tmp_path, extent)
        assert found.keys() == tensors.keys()
        assert extent.start % 64 == 0
        assert extent.nbytes == sum(t.nbytes for t in tensors.values())
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)


def test_other_tools_can_read_a_shard(tmp_path):
    write_shard(tmp_path / "x.safetensors", GROUPS)
    found = load_file(tmp_path / "x.safetensors")
    for prefix, tensors in GROUPS:
        for name, tensor in tensors.items():
            assert torch.equal(found[prefix + name], tensor)


def test_an_extent_owns_its_memory_and_no_more(tmp_path):
    _, extents = write_shard(tmp_path / "x.safetensors", GROUPS)
    found = read_extent(tmp_path, extents[0])
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found.values()
    }
    assert list(storages.values()) == [extents[0].nbytes]


def test_the_same_tensors_give_the_same_bytes(tmp_path):
    write_shard(tmp_path / "x.safetensors", GROUPS)
    write_shard(tmp_path / "y.safetensors", [(p, dict(reversed(t.items()))) for p, t in GROUPS])
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "y.safetensors").read_bytes()


def test_only_the_damaged_range_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    _, extents = write_shard(path, GROUPS)
    raw = bytearray(path.read_bytes())
    raw[extents[1].start + 7] ^= 16
    path.write_bytes(raw)
    read_extent(tmp_path, extents[0])
    for read in (read_extent, check_extent):
        with pytest.raises(CorruptError, match="a@1"):
            read(tmp_path, extents[1])


def test_an_interruption_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.safetensors"
    write_shard(path, GROUPS[:1])
    before = path.read_bytes()

    class Cut(dict):
        def __iter__(self):
            raise KeyboardInterrupt

    def groups():
        yield GROUPS[1]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(path, groups())
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("chosen", [(0, 2), (1,), (2,), (0, 1, 2)])
def test_copied_extents_are_what_writing_them_gives(tmp_path, chosen):
    _, extents = write_shard(tmp_path / "x.safetensors", GROUPS)
    (tmp_path / "copied").mkdir()
    (tmp_path / "written").mkdir()
    copied = copy_extents(
        tmp_path, [extents[i] for i in chosen], tmp_path / "copied" / "x.safetensors"
    )
    written = write_shard(tmp_path / "written" / "x.safetensors", [GROUPS[i] for i in chosen])
    assert copied == written
    raw = (tmp_path / "copied" / "x.safetensors").read_bytes()
    assert raw == (tmp_path / "written" / "x.safetensors").read_bytes()


def test_extents_of_many_pieces_are_copied(tmp_path, monkeypatch):
    monkeypatch.setattr(shard, "_CHUNK", 7)
    _, extents = write_shard(tmp_path / "x.safetensors", GROUPS)
    copy_extents(tmp_path, extents, tmp_path / "y.safetensors")
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "y.safetensors").read_bytes()
    for extent in extents:
        check_extent(tmp_path, extent)


def test_what_is_damaged_is_not_copied(tmp_path):
    path = tmp_path / "x.safetensors"
    _, extents = write_shard(path, GROUPS)
    raw = bytearray(path.read_bytes())
    raw[extents[1].start + 7] ^= 16
    path.write_bytes(raw)
    with pytest.raises(CorruptError, match="a@1"):
        copy_extents(tmp_path, extents, tmp_path / "y.safetensors")
    path.write_bytes(raw[: extents[2].start])
    with pytest.raises(CorruptError, match="truncated"):
        copy_extents(tmp_path, extents[2:], tmp_path / "y.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_copy_that_is_told_to_stop_leaves_nothing(tmp_path):
    _, extents = write_shard(tmp_path / "x.safetensors", GROUPS)
    stop = Event()
    stop.set()
    with pytest.raises(shard.Stopped):
        copy_extents(tmp_path, extents, tmp_path / "y.safetensors", stop)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
