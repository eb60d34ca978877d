"""How the decode kernel's products are cut: what was measured, what is tuned, and the formula."""

from __future__ import annotations

import importlib.util
import json
import logging
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pliant.codes import GroupInt, GroupLevels
from pliant.kernels import gpu
from pliant.kernels.cuda import build, decode, shapes, tuning
from pliant.kernels.cuda.decode import Shape, choose_shape
from pliant.kernels.cuda.shapes import Case, Gpu, candidates, formula, parse, shipped, written
from pliant.methods.levels import byte_tables
from tests.kernels.group_codes import Form, group_code

H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132)
SMALL = Gpu("a small GPU", (8, 6), 28)
CASE = Case("integers", 4, 4096, 4096)
LIBRARY = SimpleNamespace(pliant_warps=lambda loads, tiles: 8 if tiles else 16)


def code_of(out: int = 1024, width: int = 2048, bits: int = 4, digits: int = 0) -> Any:
    code = group_code(Form(bits, digits > 0, 128, 16, False), out, width)
    assert isinstance(code, GroupInt | GroupLevels)
    if digits == 1:
        return replace(code, tables=byte_tables(code.tables.float().sort(1).values).half())
    return code


@pytest.fixture(autouse=True)
def shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "_shared", lambda _: decode._SHARED)


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Codes are on that GPU; what is timed is told by a function of the shape. Gives the calls."""
    monkeypatch.setenv("PLIANT_KERNEL_CACHE", str(tmp_path / "kernels"))
    monkeypatch.delenv("PLIANT_TUNE", raising=False)
    monkeypatch.setattr(tuning, "_CHOSEN", {})
    monkeypatch.setattr(tuning, "_LEAST", 1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    asked: list[Shape] = []

    def begin(gpu: Gpu, time: Any = lambda shape: 10.0) -> list[Shape]:
        def timer(*_: Any) -> Any:
            return lambda shape, short: asked.append(shape) or time(shape)

        monkeypatch.setattr(Gpu, "of", staticmethod(lambda _: gpu))
        monkeypatch.setattr(tuning, "timer", timer)
        return asked

    return begin


# ---- the formula and the candidates -------------------------------------------------------------


@pytest.mark.parametrize("kind", ["integers", "levels", "levels one digit"])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("most", [8, 16])
def test_candidates_are_distinct_shapes_of_the_kernel(kind: str, bits: int, most: int) -> None:
    for out, width, rows, count in ((4096, 4096, 1, 132), (128, 512, 4, 28), (151936, 896, 16, 20)):
        case = Case(kind, bits, out, width, rows)
        found = candidates(case, count, most)
        assert found[0] == formula(case, count, most)
        assert len(set(found)) == len(found) > 1
        for shape in found:
            assert parse(written(shape)) == shape
            assert 1 <= shape.warps <= most
            assert 1 <= shape.row_tiles <= max(1, -(-out // 16))


@pytest.mark.parametrize("digits", [0, 1, 2])
def test_codes_of_other_digits_are_other_products(digits: int) -> None:
    kind = Case.of(code_of(64, 512, digits=digits), 1).kind
    assert kind == ("integers", "levels one digit", "levels")[digits]


@pytest.mark.parametrize("bits", range(1, 9))
def test_candidates_differ_in_what_is_launched(bits: int) -> None:
    """None is timed twice under two names: depths and loads that the width does not have."""
    code = code_of(256, 8192, bits)
    vec = decode.vector_bytes(code)
    seen = set()
    for shape in candidates(Case.of(code, 1), 1):
        loads = decode._loads(code, vec, 1, shape)
        launched = (shape.warps, shape.row_tiles, shape.depth, loads)
        assert launched not in seen
        assert shape.loads in (0, loads)
        seen.add(launched)


def test_long_rows_get_more_warps_and_tall_blocks_are_split() -> None:
    short = formula(Case("integers", 4, 2048, 2048), 132)
    long = formula(Case("integers", 4, 2048, 16384), 132)
    fewer = formula(Case("integers", 4, 4096, 16384), 132, most=8)
    assert short == Shape(8, 1)
    assert long.warps == 16
    assert fewer.warps == 8
    assert fewer.row_tiles < formula(Case("integers", 4, 4096, 16384), 132).row_tiles
    assert formula(Case("integers", 4, 14336, 4096), 132).row_tiles == 4


# ---- measured -----------------------------------------------------------------------------------


def test_a_measured_product_gets_the_fastest_shape() -> None:
    assert len(shipped().rows) >= 24
    for row in shipped().rows:
        gpu = Gpu("whatever its name", row.capability, row.multiprocessors)
        chosen = shipped().shape(row.case, gpu)
        assert chosen is not None
        assert row.times[chosen] == min(row.times.values())


def test_the_formula_is_near_the_fastest_of_what_was_measured() -> None:
    for row in shipped().rows:
        took = row.times.get(row.formula())
        assert took is None or took <= 1.25 * min(row.times.values()), row.case


def test_near_products_take_what_was_measured_and_others_nothing() -> None:
    table = shipped()
    tall = Case("levels", 2, 14336, 4096)
    assert table.shape(replace(tall, out=13824), H100) is not None
    for other in (
        replace(tall, out=512), replace(tall, out=10000), replace(tall, width=32768),
        replace(tall, bits=7),
        replace(tall, rows=8), replace(tall, rank=32), replace(tall, sparse=True),
        replace(tall, kind="signs"),
    ):  # fmt: skip
        assert table.shape(other, H100) is None
    assert table.shape(tall, SMALL) is None
    assert table.shape(tall, replace(H100, multiprocessors=114)) is None


def test_levels_of_one_digit_take_their_own_shapes_and_until_measured_those_of_two() -> None:
    tall = Case("levels", 2, 14336, 4096)
    one = replace(tall, kind="levels one digit")
    of_two = shapes.Table(tuple(row for row in shipped().rows if row.case.kind != one.kind))
    assert of_two.shape(one, H100) == of_two.shape(tall, H100) != formula(one, 132)
    times = dict.fromkeys(candidates(one, 132), 9.0)
    best = Shape(16, 7)
    assert best in times
    own = shapes.Measured(one, 132, H100.capability, times | {best: 4.0})
    table = shapes.Table((*of_two.rows, own))
    assert table.shape(one, H100) == best
    assert table.shape(tall, H100) == shipped().shape(tall, H100) != best


def test_near_products_outvote_a_farther_one_and_noise_is_not_followed() -> None:
    usual, best = formula(CASE, 132), Shape(16, 2)
    times = dict.fromkeys(candidates(CASE, 132), 9.0) | {usual: 8.0, best: 4.0}
    row = shapes.Measured(CASE, 132, (9, 9), times)
    here = Gpu("", (9, 9), 132)
    near = replace(CASE, out=4000, width=4224)
    assert shapes.Table((row,)).shape(near, here) == best
    against = replace(row, case=replace(CASE, width=5120), times=times | {best: 16.0})
    assert shapes.Table((row, against)).shape(near, here) == best
    assert shapes.Table((row, against)).shape(replace(CASE, width=5000), here) == usual
    hardly = replace(row, times=times | {best: 7.9})
    assert shapes.Table((hardly,)).shape(near, here) == usual


def test_shapes_that_cannot_be_read_are_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for text in ("{", "[]", '{"devices": [{}]}', '{"devices": 3}'):
        (tmp_path / "shapes.json").write_text(text)
        monkeypatch.setattr(shapes, "_SHIPPED", tmp_path / "shapes.json")
        with caplog.at_level(logging.WARNING):
            assert shipped.__wrapped__() == shapes.Table(())
        assert "shapes" in caplog.text


# ---- tuned --------------------------------------------------------------------------------------


def test_the_three_that_seem_fastest_are_timed_again() -> None:
    tried = [Shape(8, tiles) for tiles in range(1, 7)]
    calls: list[tuple[int, bool]] = []

    def timed(shape: Shape, short: bool) -> float:
        calls.append((shape.row_tiles, short))
        if shape.row_tiles == 6:
            raise RuntimeError("does not fit")
        return float(shape.row_tiles) if short else 10.0 - shape.row_tiles

    found = tuning.fastest(tried, timed)
    assert [s.row_tiles for s in found] == [3, 2, 1, 4, 5]
    assert calls == [(t, True) for t in range(1, 7)] + [(t, False) for t in (1, 2, 3)]


def test_the_first_product_is_tuned_and_the_next_remembered(on: Any) -> None:
    asked = on(SMALL, lambda shape: 5.0 if shape == Shape(4, 1) else 10.0)
    code = code_of()
    assert choose_shape(code, 1, LIBRARY) == Shape(4, 1)
    assert set(asked) == set(candidates(Case.of(code, 1), 28))
    asked.clear()
    assert choose_shape(code, 1, LIBRARY) == Shape(4, 1)
    tuning._CHOSEN.clear()  # another process
    assert choose_shape(code_of(), 1, LIBRARY) == Shape(4, 1)
    assert not asked
    for n in (3, 4):  # one compiled kernel, which runs with eight warps
        assert choose_shape(code, n, LIBRARY).warps <= 8
    assert len(asked) == len(candidates(Case.of(code, 4), 28, 8)) + 3


def test_what_is_hardly_faster_than_the_formula_is_not_taken(on: Any) -> None:
    on(SMALL, lambda shape: 9.9 if shape == Shape(4, 1) else 10.0)
    code = code_of()
    assert choose_shape(code, 1, LIBRARY) == formula(Case.of(code, 1), 28)


def test_nothing_is_timed_while_a_graph_is_captured(
    on: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = on(SMALL, lambda shape: 5.0 if shape == Shape(4, 1) else 10.0)
    code = code_of()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    usual = formula(Case.of(code, 1), 28)
    assert choose_shape(code, 1, LIBRARY) == usual == choose_shape(code, 1, LIBRARY)
    assert not asked
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert choose_shape(code, 1, LIBRARY) == Shape(4, 1)
    asked.clear()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose_shape(code, 1, LIBRARY) == Shape(4, 1)  # what the run before has chosen
    assert not asked


def test_nothing_is_timed_when_turned_off_or_measured_or_without_the_kernel(
    on: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = on(SMALL)
    code = code_of()
    usual = formula(Case.of(code, 1), 28)
    assert choose_shape(code, 1) == usual
    monkeypatch.setenv("PLIANT_TUNE", "0")
    assert choose_shape(code, 1, LIBRARY) == usual
    monkeypatch.delenv("PLIANT_TUNE")
    on(H100)
    measured = shipped().rows[0]
    like = code_of(measured.case.out, measured.case.width, measured.case.bits)
    assert choose_shape(like, 1, LIBRARY) == measured.best()
    assert not asked


def test_nothing_is_timed_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "timer", lambda *_: pytest.fail("timed"))
    monkeypatch.setattr(tuning, "_LEAST", 1)
    code = code_of()
    assert choose_shape(code, 1, LIBRARY) == formula(Case.of(code, 1), 132)


def test_a_gpu_on_which_nothing_can_be_timed_gets_the_formula_and_keeps_nothing(
    on: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(shape: Shape) -> float:
        raise RuntimeError("out of memory")

    on(SMALL, fail)
    code = code_of()
    assert choose_shape(code, 1, LIBRARY) == formula(Case.of(code, 1), 28)
    assert "not tuned" in caplog.text
    assert not (tmp_path / "kernels").exists()


# ---- on disk ------------------------------------------------------------------------------------


def test_a_tuned_shape_comes_back_from_disk(tmp_path: Path) -> None:
    path = tmp_path / "below" / "shapes.json"
    assert tuning.Cached(path).get(CASE) is None
    tuning.Cached(path).put(CASE, Shape(16, 3, 2, 1))
    tuning.Cached(path).put(replace(CASE, kind="levels"), Shape(4, 1))
    assert tuning.Cached(path).get(CASE) == Shape(16, 3, 2, 1)
    assert tuning.Cached(path).get(replace(CASE, kind="levels")) == Shape(4, 1)
    assert [p.name for p in path.parent.iterdir()] == ["shapes.json"]


@pytest.mark.parametrize("name", list(asdict(CASE)))
def test_each_part_of_a_product_is_in_its_key(name: str) -> None:
    value = getattr(CASE, name)
    other = f"{value} x" if isinstance(value, str) else not value if value is False else value + 1
    assert replace(CASE, **{name: other}).key != CASE.key


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1]", b"\xff\xfe\x00", b'{"%s": 3}', b'{"%s": "8/0/0/0"}', b'{"%s": "a/b"}'],
)
def test_a_corrupted_file_is_ignored_and_written_anew(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "shapes.json"
    path.write_bytes(content.replace(b"%s", CASE.key.encode()))
    assert tuning.Cached(path).get(CASE) is None
    assert "ignored" in caplog.text
    tuning.Cached(path).put(CASE, Shape(4, 2))
    assert tuning.Cached(path).get(CASE) == Shape(4, 2)


def test_a_folder_that_cannot_be_written_costs_a_line(
    on: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    on(SMALL, lambda shape: 5.0 if shape == Shape(4, 1) else 10.0)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PLIANT_KERNEL_CACHE", str(tmp_path / "file"))
    assert choose_shape(code_of(), 1, LIBRARY) == Shape(4, 1)
    assert "not kept" in caplog.text


def test_another_source_or_gpu_is_another_file(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {tuning.Cached.of(gpu).path.name for gpu in (H100, SMALL)}
    source = tuning.source()
    assert (Path(decode.__file__).with_name("decode.cu")).read_bytes() in source
    monkeypatch.setattr(tuning, "source", lambda: source + b" ")
    names |= {tuning.Cached.of(gpu).path.name for gpu in (H100, SMALL)}
    assert len(names) == 4
    assert tuning.Cached.of(H100).path.parent == build.folder()


# ---- who asks -----------------------------------------------------------------------------------


def test_the_registered_product_passes_its_kernel_and_dtype(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Any] = []
    monkeypatch.setenv("PLIANT_GPU_KERNELS", "1")
    monkeypatch.setattr(gpu, "has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(build, "library", lambda *_: LIBRARY)
    monkeypatch.setattr(gpu, "choose_shape", lambda *given: seen.append(given) or Shape(4, 2))
    monkeypatch.setattr(gpu, "multiply", lambda x, code, library, stream, shape: shape)
    code = code_of()
    assert gpu.group(torch.zeros(3, 2048, dtype=torch.float16), code) == Shape(4, 2)
    (given,) = seen
    assert given[:3] == (code, 3, LIBRARY)
    assert given[4] == torch.float16


# ---- the data file ------------------------------------------------------------------------------


@pytest.fixture
def script() -> Any:
    path = Path(__file__).parents[2] / "bench" / "shapes.py"
    spec = importlib.util.spec_from_file_location("bench_shapes", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_measurements_become_the_data_file(script: Any, tmp_path: Path) -> None:
    """Both forms of a row; what was there of another GPU, or of another product, stays."""
    about = {"device": "some GPU", "capability": [10, 0], "multiprocessors": 148}
    tried = {"8/2/0/0": 7.0, "16/2/2/0": 6.0}
    one = Case("levels one digit", 3, 512, 1024)
    rows = {
        "decode int4 4096x4096": {"us": 6.0, "case": asdict(CASE), "tried": tried},
        "decode levels3 512x1024 again": {"us": 6.0, "case": asdict(one), "tried": tried},
        "decode levels3 512x1024": {
            "us": 5.0, "how": "8 warps, 1 tiles, 0 deep, 2 loads", "next": "4/1/0/0=4.9; 8/1/2/0=8",
        },
        "copy": {"gbs": 1.0},
    }  # fmt: skip
    (tmp_path / "kernels.json").write_text(json.dumps(about | {"rows": rows}))
    target = tmp_path / "shapes.json"
    target.write_text(Path(shapes.__file__).with_name("shapes.json").read_text())
    script.refresh([tmp_path / "kernels.json"], target)
    script.refresh([tmp_path / "kernels.json"], target)
    table = shapes.read_table(json.loads(target.read_text()))
    here = Gpu("", (10, 0), 148)
    assert table.shape(CASE, here) == Shape(16, 2, 2, 0)
    assert table.shape(Case("levels", 3, 512, 1024), here) == Shape(8, 1, 0, 2)
    assert table.shape(one, here) == Shape(16, 2, 2, 0)
    assert len(table.rows) == len(shipped().rows) + 3
    assert "formula: geometric mean" in script.compare(table, table)
