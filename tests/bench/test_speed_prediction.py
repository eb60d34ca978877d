import importlib.util
import json
from pathlib import Path

import pytest

from pliant.bench import costs_of_artifact
from pliant.ladder import Artifact
from pliant.measure.speed import Speed

from ..ladder.tiny import write_artifact

_PATH = Path(__file__).parents[2] / "bench" / "speed_prediction.py"


@pytest.fixture
def script(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("speed_prediction", _PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


def test_a_figure_is_the_median_of_its_rounds(script, machine, monkeypatch, tmp_path):
    artifact = Artifact.open(write_artifact(tmp_path / "tiny"))
    costs = costs_of_artifact(artifact)
    paces = iter([10.0] * 4 + [50.0] * 4 + [20.0] * 4)
    monkeypatch.setattr(
        script, "speed", lambda *args, **kwargs: Speed(prefill_tps=1.0, decode_tps=next(paces))
    )
    rows = script.compare(artifact, costs, 4, 3)
    sizes = [row["weight_bytes"] for row in rows]
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-1]) == (artifact.ladder.smallest_bytes, artifact.ladder.largest_bytes)
    for row in rows:
        assert row["rounds"] == [10.0, 50.0, 20.0]
        assert row["measured"] == 20.0
        assert row["error"] == row["predicted"] / 20 - 1
    rows = [row | {"error": error} for row, error in zip(rows, (0.1, -0.2, 0.0, 0.15), strict=True)]
    run = {"artifact": "tiny", "threads": 1, "calibration_seconds": 3.0, "load": 0.5, "rows": rows}
    script.write([run])
    text = (tmp_path / "speed_prediction.md").read_text()
    assert "threads: 1, rounds: 3" in text
    assert "largest error 20.0%, mean 11.2%; 3 of 4 within 15%" in text
    assert json.loads((tmp_path / "speed_prediction.json").read_text()) == {"runs": [run]}
