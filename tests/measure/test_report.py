import json
import math
import re

import pytest

from pliant.errors import PliantError
from pliant.measure.pages import page
from pliant.measure.report import Cell, Measured, ReportData, grid_of, summary, write_report

MIB = 1 << 20
ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def example(**changes) -> ReportData:
    sizes = [40 * MIB + i * MIB // 4 for i in range(400)]
    curve = [(s, 3.0 * math.exp(-(s / MIB - 40) / 14)) for s in sizes]
    cells = [
        Cell(role, block, 2.3 + (block * 7 + i * 5) % 11 / 3, 1000)
        for i, role in enumerate(ROLES)
        for block in range(30)
    ]
    cells += [Cell("embed_tokens", None, 2.3 + i % 4) for i in range(8)]
    measured = [
        Measured(s * MIB, 3.1 * math.exp(-(s - 40) / 13.5), low=2.9 * math.exp(-(s - 40) / 13.5),
                 high=3.3 * math.exp(-(s - 40) / 13.5), series="measured on WikiText-2")
        for s in (45, 55, 65, 80, 100, 130)
    ]  # fmt: skip
    measured += [Measured(s * MIB, 5 * math.exp(-(s - 40) / 14), series="uniform GPTQ")
                 for s in (55, 72)]  # fmt: skip
    fields = {
        "model": "SmolLM2-135M-Instruct",
        "budget": 128 * MIB,
        "context": 2048,
        "batch": 1,
        "breakdown": {"weights": 52 * MIB, "embeddings": 13 * MIB, "kv_cache": 45 * MIB,
                      "activations": 17 * MIB, "free": MIB},
        "frontier": curve,
        "opened": (65 * MIB, 3.0 * math.exp(-25 / 14)),
        "original_bytes": 257 * MIB,
        "allocation": cells,
        "measured": measured,
        "facts": {"Decode": "31 tokens/s"},
        "columns": ["size", "weights", "bits", "damage", "95% interval", "perplexity", "top-1"],
        "rows": [[f"{s} MiB", s * MIB, s / 16.0, 3.1 * math.exp(-(s - 40) / 13.5), "0.41 to 0.47",
                  24.1, "81%"] for s in (45, 55, 65, 80, 100, 130)],
    }  # fmt: skip
    return ReportData(**fields | changes)


def test_everything_is_written_and_the_pictures_are_pictures(tmp_path):
    paths = write_report(example(), tmp_path / "new")
    assert [p.name for p in paths] == [
        "report.html", "frontier.png", "allocation.png", "memory.png", "table.png", "report.json",
    ]  # fmt: skip
    for path in paths[1:5]:
        head = path.read_bytes()
        assert head[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = (int.from_bytes(head[at : at + 4]) for at in (16, 20))
        assert width > 800
        assert height > 200
    assert json.loads(paths[-1].read_text())["opened"][0] == 65 * MIB


def test_the_page_needs_no_network():
    text = page(example())
    outside = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"(src|href)=|@import|url\(", outside)
    assert "Plotly.react" in text
    assert "prefers-color-scheme: dark" in outside
    assert 'name="viewport"' in outside


def test_names_cannot_break_out_of_the_page():
    text = page(example(model="</script><script>alert(1)</script>", facts={"<b>": "<i>"}))
    assert "alert(1)</script>" not in text.replace("&lt;/script&gt;", "")
    assert "<b>" not in text.split("<dl>")[1].split("</dl>")[0]


def test_the_heat_map_orders_roles_and_averages_experts():
    grid = grid_of(
        [
            Cell("down_proj", 0, 3.0, 100),
            Cell("q_proj", 1, 4.0),
            Cell("gate_up_proj", 0, 2.0, 300),
            Cell("gate_up_proj", 0, 4.0, 100),
            Cell("router", 0, 8.0),
            Cell("lm_head", None, 5.0),
            Cell("lm_head", None, 6.0),
        ]
    )
    assert grid.roles == ["q", "gate_up", "down", "router"]
    assert grid.blocks == [0, 1]
    assert grid.bits == [[None, 4.0], [2.5, None], [3.0, None], [8.0, None]]
    assert grid.strips == {"head": [5.0, 6.0]}
    assert grid.limits == (2.0, 8.0)


def test_the_opened_sizes_damage_is_the_measured_one_where_there_is_one():
    assert "planned" not in summary(example())["Damage"]
    assert "planned" in summary(example(measured=()))["Damage"]


def test_a_report_of_little_still_renders(tmp_path):
    data = example(measured=(), rows=(), columns=(), facts={}, budget=None,
                   frontier=[(40 * MIB, 0.0)], opened=(40 * MIB, 0.0),
                   allocation=[Cell("c_attn", 0, 4.0)])  # fmt: skip
    assert len(write_report(data, tmp_path)) == 5
    assert len(write_report(example(allocation=[Cell("lm_head", None, 4.0)]), tmp_path)) == 6


def test_missing_parts_and_places_are_named(tmp_path):
    with pytest.raises(PliantError, match="no kv_cache"):
        example(breakdown={"weights": 1, "embeddings": 1, "activations": 1, "free": 0})
    with pytest.raises(PliantError, match="at least one point"):
        example(frontier=[])
    (tmp_path / "file").write_text("")
    with pytest.raises(PliantError, match="cannot be written"):
        write_report(example(), tmp_path / "file")
