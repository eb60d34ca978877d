"""A writer never leaves half an artifact, and never loses a whole one."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess

import pytest
import torch

from pliant.codes import Dense
from pliant.errors import CorruptError, PliantError
from pliant.ladder import (
    Artifact,
    Ladder,
    Proposal,
    Writer,
    check_output,
    output,
    placing,
    shard,
)
from pliant.ladder.shard import read_extent, write_shard

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


def test_a_shard_is_written_anew_only_where_much_of_it_is_left_out(tmp_path):
    writer = Writer(tmp_path / "out", key="a")
    small, *most = writer.write("outer", dense("t", 3, 50, 60))
    writer.write_fixed({"norm.weight": torch.ones(8)})
    written = (writer.directory / "outer.safetensors").stat()
    rungs = tuple(dataclasses.replace(rung, index=i) for i, rung in enumerate(most))
    out = writer.finish(Ladder({"t": rungs}, (), writer.fixed_bytes), files={"config.json": "{}"})
    assert small.nbytes < 0.1 * sum(rung.nbytes for rung in most)
    assert (out / "outer.safetensors").stat().st_ino == written.st_ino
    artifact = Artifact.open(out)
    artifact.verify()
    assert [artifact.load_code("t", i).shape[0] for i in (0, 1)] == [50, 60]


def test_rungs_that_the_ladder_leaves_out_take_no_disk(tmp_path):
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


def several(out, count: int = 7, **options) -> tuple[Writer, Ladder]:
    """A writer of `count` shards of three rungs, and a ladder that leaves one out of most."""
    writer = Writer(out, key="a", **options)
    writer.write_fixed({"norm.weight": torch.ones(8)})
    rungs = {}
    for n in range(count):
        written = writer.write(f"block-{n:05d}", dense(f"t{n}", 3 + n, 50 + n, 900 + n))
        kept = [rung for rung in written if n % 4 == 3 or rung.index != (n + 2) % 3]
        rungs[f"t{n}"] = tuple(dataclasses.replace(r, index=i) for i, r in enumerate(kept))
    return writer, Ladder(rungs, (), writer.fixed_bytes)


@pytest.mark.parametrize("threads", [1, 5])
def test_shards_placed_side_by_side_are_what_writing_what_is_kept_gives(
    threads, tmp_path, monkeypatch
):
    monkeypatch.setattr(placing, "_THREADS", threads)
    writer, ladder = several(tmp_path / "out")
    expected = tmp_path / "expected"
    expected.mkdir()
    for target, own in ladder.rungs.items():
        name = own[0].where.shard
        written = sum(rung.nbytes for rung in writer.rungs(name.removesuffix(".safetensors")))
        if sum(rung.nbytes for rung in own) >= 0.9 * written:
            (expected / name).write_bytes((writer.directory / name).read_bytes())
            continue
        assert target in ("t0", "t6")  # those that leave the largest out
        groups = [(r.where.prefix, read_extent(writer.directory, r.where)) for r in own]
        write_shard(expected / name, groups)
    out = writer.finish(ladder, files={"config.json": "{}"})
    artifact = Artifact.open(out)
    artifact.verify()
    found = contents(out)
    assert {name: found[name] for name in contents(expected)} == contents(expected)
    assert list(artifact.document.shards) == sorted(artifact.document.shards)
    for target, own in ladder.rungs.items():
        for rung in own:
            assert artifact.load_code(target, rung.index).nbytes == rung.nbytes
    assert not writer.directory.exists()


def test_a_damaged_shard_ends_the_others_and_the_work_is_kept(tmp_path):
    writer, ladder = several(tmp_path / "out")
    path = writer.directory / "block-00006.safetensors"
    whole = path.read_bytes()
    where = ladder.rungs["t6"][0].where
    path.write_bytes(
        whole[: where.start] + bytes([whole[where.start] ^ 1]) + whole[where.start + 1 :]
    )
    with pytest.raises(CorruptError, match="t6@"):
        writer.finish(ladder, files={"config.json": "{}"})
    assert not (tmp_path / "out").exists()
    assert not (writer.directory / "artifact").exists()
    path.write_bytes(whole)
    Artifact.open(writer.finish(ladder, files={"config.json": "{}"})).verify()


def test_a_disk_that_is_full_in_one_thread_is_told(tmp_path, monkeypatch):
    writer, ladder = several(tmp_path / "out")
    real = placing.copy_extents

    def full(directory, extents, path, stop):
        if "00006" in path.name:
            path.with_suffix(".tmp").write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return real(directory, extents, path, stop)

    needed = sum(own.nbytes for own in placing.placements(ladder, writer._journal.shards))
    with monkeypatch.context() as patch:
        patch.setattr(placing, "copy_extents", full)
        with pytest.raises(PliantError, match=f"full: {needed / 1024:.1f} KiB were needed"):
            writer.finish(ladder, files={})
    assert not (writer.directory / "artifact").exists()
    Artifact.open(Writer(tmp_path / "out", key="a").finish(ladder, files={})).verify()


def test_an_interruption_ends_copies_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    monkeypatch.setattr(placing, "_THREADS", 2)
    monkeypatch.setattr(shard, "_CHUNK", 64)
    writer, ladder = several(tmp_path / "out")
    ended = []
    real = placing.copy_extents

    def followed(directory, extents, path, stop):
        try:
            return real(directory, extents, path, stop)
        except shard.Stopped:
            ended.append(path.name)
            raise
        finally:
            assert not path.with_name(path.name + ".tmp").exists()

    class Waiting(placing.Event):
        """Never says that it was not set: a copy goes on only once it is interrupted."""

        def is_set(self):
            return self.wait()

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(placing, "copy_extents", followed)
        patch.setattr(placing, "Event", Waiting)
        patch.setattr(placing, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            writer.finish(ladder, files={})
    assert 1 <= len(ended) <= 2, "those under way end, the others never begin"
    assert not (tmp_path / "out").exists()
    assert not (writer.directory / "artifact").exists()
    Artifact.open(Writer(tmp_path / "out", key="a").finish(ladder, files={})).verify()


def same(one, other) -> bool:
    mine, theirs = one.tensors(), other.tensors()
    return one.meta() == other.meta() and all(
        mine[name].dtype == theirs[name].dtype
        and mine[name].stride() == theirs[name].stride()
        and torch.equal(mine[name], theirs[name])
        for name in mine.keys() | theirs.keys()
    )


def test_held_codes_are_those_on_disk(tmp_path, tiny):
    """Also where tensors are views of larger ones, or not in order."""
    ladder = Artifact.open(tiny).ladder
    writer = Writer(tmp_path / "out", key="a", hold={"cpu": 1 << 30})
    for target in ladder.rungs:
        codes = [Artifact.open(tiny).load_code(target, r.index) for r in ladder.rungs[target]]
        codes.append(Dense(torch.randn(16, 300).t()[:, 3:9].double().half()))
        writer.write(target, [Proposal(target, "any", {}, code) for code in codes])
    reread = Writer(tmp_path / "out", key="a")
    for own in writer.all_rungs().values():
        for rung in own:
            assert same(writer.load_code(rung), reread.load_code(rung))
    shutil.rmtree(writer.directory)
    for own in writer.all_rungs().values():
        for rung in own:
            assert writer.load_code(rung).nbytes == rung.nbytes
            with pytest.raises(CorruptError, match="cannot be read"):
                reread.load_code(rung)


def test_no_more_is_held_than_allowed_and_nothing_stale(tmp_path):
    writer = Writer(tmp_path / "out", key="a", hold={"cpu": 16 * 9})
    small, _, large = writer.write("outer", dense("t", 3, 9, 5))
    path = writer.directory / "outer.safetensors"
    first = path.read_bytes()
    path.unlink()
    assert writer.load_code(small).nbytes == 48
    with pytest.raises(CorruptError):
        writer.load_code(large)
    path.write_bytes(first)
    assert writer.load_code(large).nbytes == 144
    zeros = [Proposal("t", "dense", {"n": n}, Dense(torch.zeros(n, 8).half())) for n in (3, 9, 5)]
    replaced, *_ = writer.write("outer", zeros)
    assert (replaced.where.start, replaced.where.stop) == (small.where.start, small.where.stop)
    assert not writer.load_code(replaced).decode().any()
    with pytest.raises(CorruptError):
        writer.load_code(small)
    path.unlink()
    assert not writer.load_code(replaced).decode().any(), "what was let go of made room"


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

    def cut(*paths):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shard.os, "replace", cut)
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

    def full(*paths):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shard.os, "replace", full)
        with pytest.raises(PliantError, match="free some space"):
            writer.write("outer", dense("t", 2))
    assert [p.name for p in writer.directory.iterdir()] == ["journal.json"]
    writer.write("outer", dense("t", 2))
