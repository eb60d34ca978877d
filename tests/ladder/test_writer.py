"""A writer never leaves half an artifact, and never loses a whole one."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest
import torch

from pliant.codes import Dense
from pliant.errors import PliantError
from pliant.ladder import Artifact, Ladder, Proposal, Writer, check_output, output, shard

from .tiny import write_artifact


def contents(directory):
    return {p.name: p.read_bytes() for p in directory.iterdir()}


def dense(target: str, *rows: int) -> list[Proposal]:
    return [
        Proposal(target, "dense", {"n": n}, Dense(torch.full((n, 8), 1.0).half())) for n in rows
    ]


def small(writer: Writer):
    rungs = writer.all_rungs()
    return writer.finish(
        Ladder({t: tuple(r) for t, r in rungs.items()}, (), writer.fixed_bytes),
        files={"config.json": "{}"},
    )


def test_the_same_inputs_give_the_same_bytes(tmp_path, tiny):
    again = write_artifact(tmp_path / "again")
    assert contents(again) == contents(tiny)
    assert not (tmp_path / "again.partial").exists()


def test_interrupted_work_goes_on_and_gives_the_same_bytes(tmp_path, tiny):
    out = tmp_path / "out"
    started = Writer(out, key="tiny")
    written = []
    real = started.write

    def stop_at_the_second(name, proposals):
        if written:
            raise KeyboardInterrupt
        written.append(name)
        return real(name, proposals)

    started.write = stop_at_the_second
    with pytest.raises(KeyboardInterrupt):
        write_artifact(out, started)
    assert not out.exists()
    resumed = Writer(out, key="tiny")
    assert resumed.resumed
    assert resumed.has("block-00000")
    assert not resumed.has("block-00001")
    assert contents(write_artifact(out, resumed)) == contents(tiny)


def test_work_of_other_inputs_or_damaged_work_is_not_taken_up(tmp_path):
    out = tmp_path / "out"
    first = Writer(out, key="a")
    first.write("outer", dense("t", 2))
    first.save_state("ranking", [1, 2])
    path = out.with_name("out.partial") / "outer.safetensors"
    raw = bytearray(path.read_bytes())
    assert Writer(out, key="a").state("ranking") == [1, 2]
    assert Writer(out, key="a").has("outer")
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert not Writer(out, key="a").has("outer")
    again = Writer(out, key="a")
    again.write("outer", dense("t", 2))
    other = Writer(out, key="b")
    assert not other.resumed
    assert other.state("ranking") is None


def test_codes_can_be_read_back_while_writing(tmp_path):
    writer = Writer(tmp_path / "out", key="a")
    rungs = writer.write("outer", dense("t", 9, 3, 5))
    assert [r.nbytes for r in rungs] == [48, 80, 144]
    assert [r.index for r in rungs] == [0, 1, 2]
    assert writer.load_code(rungs[2]).shape == (9, 8)


def test_rungs_that_the_ladder_leaves_out_take_no_disk(tmp_path):
    import dataclasses

    writer = Writer(tmp_path / "out", key="a")
    kept, _, last = writer.write("outer", dense("t", 3, 5, 9))
    writer.write_fixed({"norm.weight": torch.ones(8)})
    ladder = Ladder(
        {"t": (kept, dataclasses.replace(last, index=1, damage=0.5))}, (), writer.fixed_bytes
    )
    out = writer.finish(ladder, files={"config.json": "{}"})
    artifact = Artifact.open(out)
    artifact.verify()
    assert artifact.load_code("t", 1).shape == (9, 8)
    assert artifact.rung("t", 1).damage == 0.5
    assert (out / "outer.safetensors").stat().st_size < 3000


def test_an_output_that_exists_is_refused(tmp_path, mine):
    before = contents(mine)
    with pytest.raises(PliantError, match="exists"):
        Writer(mine, key="a")
    assert contents(mine) == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(PliantError, match="not a Pliant artifact"):
            Writer(tmp_path / "notes", key="a", overwrite=overwrite)
    with pytest.raises(PliantError, match="not a Pliant artifact"):
        check_output(tmp_path / "notes" / "thesis.txt", overwrite=True)
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("more work")
    with pytest.raises(PliantError, match="in the way"):
        Writer(tmp_path / "out", key="a")
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty")


def test_overwriting_swaps_only_when_the_new_one_is_whole(tmp_path, mine, monkeypatch):
    before = contents(mine)
    writer = Writer(mine, key="new", overwrite=True)
    writer.write("outer", dense("t", 2))
    writer.write_fixed({"norm.weight": torch.ones(8)})
    assert contents(mine) == before
    real = os.rename

    def fail(source, destination):
        if os.fspath(source).endswith("artifact"):
            raise OSError(5, "Input/output error")
        real(source, destination)

    with monkeypatch.context() as patch:
        patch.setattr(output.os, "rename", fail)
        with pytest.raises((PliantError, OSError)):
            small(writer)
    assert contents(mine) == before
    small(writer)
    assert set(Artifact.open(mine).ladder.rungs) == {"t"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine"]


def test_a_replacement_cut_between_its_renames_is_undone(mine):
    before = contents(mine)
    os.rename(mine, mine.with_name(".mine.replaced"))
    Artifact.open(mine).verify()
    assert contents(mine) == before


def test_a_write_cut_in_the_middle_of_a_shard_leaves_the_old_artifact(mine, monkeypatch):
    before = contents(mine)
    writer = Writer(mine, key="new", overwrite=True)
    writer.write("outer", dense("t", 2))

    def cut(descriptor):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shard.os, "fsync", cut)
        with pytest.raises(KeyboardInterrupt):
            writer.write("block-00000", dense("u", 2))
    assert contents(mine) == before
    resumed = Writer(mine, key="new", overwrite=True)
    assert resumed.has("outer")
    assert not resumed.has("block-00000")
    assert not list(resumed.directory.glob("*.tmp"))


@pytest.fixture
def full_disk(tmp_path):
    """A directory on a disk of 256 KiB, where the system lets us mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_told_and_the_work_is_kept(full_disk):
    writer = Writer(full_disk / "out", key="a")
    writer.write("outer", dense("t", 8))
    with pytest.raises(PliantError, match=r"full: 390\.\d KiB were needed, \d+\.\d KiB are free"):
        writer.write("block-00000", dense("u", 25_000))
    names = sorted(p.name for p in writer.directory.iterdir())
    assert names == ["journal.json", "outer.safetensors"]
    resumed = Writer(full_disk / "out", key="a")
    assert resumed.has("outer")
    resumed.write_fixed({"norm.weight": torch.ones(8)})
    with pytest.raises(PliantError, match="full"):
        resumed.finish(
            Ladder({"t": tuple(resumed.rungs("outer"))}, (), resumed.fixed_bytes),
            files={"config.json": "{}", "tokenizer.json": "x" * 400_000},
        )
    assert not (full_disk / "out").exists()
    small(Writer(full_disk / "out", key="a"))
    Artifact.open(full_disk / "out").verify()


def test_a_full_disk_without_mounting(tmp_path, monkeypatch):
    writer = Writer(tmp_path / "out", key="a")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shard.os, "fsync", full)
        with pytest.raises(PliantError, match="free some space"):
            writer.write("outer", dense("t", 2))
    assert [p.name for p in writer.directory.iterdir()] == ["journal.json"]
    writer.write("outer", dense("t", 2))
