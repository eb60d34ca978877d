"""The quality bench on a tiny model with peers made for the test."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import TEXT
from tests.tiny import CONTEXT, memory, save_recipe, save_tiny

BENCH = Path(__file__).parents[2] / "bench"
sys.path.insert(0, str(BENCH))
import quality  # noqa: E402
import quality_peers  # noqa: E402
from quality_rows import Rows  # noqa: E402

ROUNDS = """
import json, sys
from pathlib import Path
from safetensors.torch import load_file, save_file
if sys.argv[1] == "--list":
    print(json.dumps(["coarse", "fine", "none"]))
    sys.exit()
source, ids, out, point = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[5]
if point == "none":
    sys.exit("the kernel needs a GPU")
assert load_file(ids)["ids"].shape[1] == 512 and "pliant" not in sys.modules
step = {"coarse": 0.3, "fine": 0.02}[point]
weights = load_file(source / "model.safetensors")
rounded = {n: (w / step).round() * step for n, w in weights.items() if w.dim() == 2}
inner = {n: w for n, w in rounded.items() if "embed" not in n}
numbers = sum(w.numel() for w in inner.values())
save_file(rounded, out / "weights.safetensors")
bits = {"coarse": 4, "fine": 5}[point]
(out / "point.json").write_text(json.dumps({
    "peer": "rounding", "version": "1", "point": point, "options": {}, "seconds": 0.0,
    "linear_bytes": numbers * bits // 8, "outer_bytes": 320 * 64 * 2, "other_bytes": 7 * 64 * 4,
    "device": "cpu", "note": ""}))
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def run(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:  # (*options) -> rows.json
    from pliant.fit import fit

    text, peers = tmp_path / "text.txt", tmp_path / "peers"
    text.write_text(TEXT * 12)
    peers.mkdir()
    (peers / "rounding.py").write_text(ROUNDS)
    (peers / "_shared.py").write_text("raise SystemExit('a helper is no peer')")
    monkeypatch.setattr(quality_peers, "PEERS", peers)
    fit(
        tiny, memory(tiny), tmp_path / "ours", context=CONTEXT, text=text,
        recipe=save_recipe(tmp_path / "recipe.yaml"),
    )  # fmt: skip
    common = ["--model", str(tiny), "--text", str(text), "--kinds", "none", "--windows", "2",
              "--comparisons", "total", "--calibration-windows", "3",
              "--ours", str(tmp_path / "ours")]  # fmt: skip

    def bench(*options: str, work: str = "work") -> dict[str, Any]:
        place = ["--work", str(tmp_path / work), "--results", str(tmp_path / work / "quality")]
        monkeypatch.setattr(sys, "argv", ["quality.py", *common, *place, *options])
        quality.main()
        found: dict[str, Any] = json.loads((tmp_path / work / "rows.json").read_text())
        return found

    return bench


def test_run_resumes_lists_failures_and_holds_the_bytes(run: Any, tmp_path: Path) -> None:
    rows = run()
    assert set(rows["peers"]) == {"model|rounding|coarse", "model|rounding|fine"}
    assert rows["failed"] == {"model|rounding|none": "the kernel needs a GPU"}
    coarse, fine = (rows["peers"][f"model|rounding|{p}"] for p in ("coarse", "fine"))
    assert coarse["bits"] == pytest.approx(4.0)
    assert coarse["total"]["kl"] > 2 * fine["total"]["kl"] > 0
    # Only the point of at most 4.6 bits is one at which ours is wanted.
    (key,) = rows["ours"]
    asked = int(key.rsplit("|", 1)[1])
    assert asked == coarse["linear_bytes"] + coarse["outer_bytes"] + coarse["other_bytes"]
    assert 0 < rows["ours"][key]["bytes"] <= asked
    told = (tmp_path / "work" / "quality.md").read_text()
    assert "not counted" in told
    assert "the kernel needs a GPU" in told
    assert (tmp_path / "work" / "quality.png").stat().st_size > 1000

    with quality.locked(tmp_path / "work"), pytest.raises(SystemExit, match="another run"):
        run()

    # What is known is not measured again, and what was lost is.
    kept = tmp_path / "work" / "rows.json"
    rows["peers"]["model|rounding|fine"]["total"]["kl"] = 123.0
    del rows["peers"]["model|rounding|coarse"]
    kept.write_text(json.dumps(rows))
    again = run()
    assert again["peers"]["model|rounding|fine"]["total"]["kl"] == 123.0
    assert again["peers"]["model|rounding|coarse"]["total"] == coarse["total"]


def test_our_side_of_another_machine_is_merged(run: Any, tmp_path: Path) -> None:
    run("--peers-only")
    here = tmp_path / "work"
    there = run("--ours-only", "--sizes", str(here / "sizes.json"),
                "--ids", str(here / "ids.safetensors"), work="there")  # fmt: skip
    assert not there["peers"]
    assert len(there["ours"]) == 1
    merged = run("--peers-only", "--merge", str(tmp_path / "there" / "rows.json"))
    assert merged["ours"] == there["ours"]
    assert len(merged["peers"]) == 2
    other = there | {"settings": {"wikitext": [2, 512, "0"]}}
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(SystemExit, match="other windows of wikitext"):
        run("--peers-only", "--merge", str(tmp_path / "other.json"))


def test_substitution_changes_only_what_it_is_told(tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny)
    held = quality_peers.Substitution(model)
    ids = torch.arange(16)[None]
    weights = load_file(tiny / "model.safetensors")
    embedding, linear = "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"
    save_file({n: weights[n] * 1.5 for n in (embedding, linear)}, tmp_path / "w.safetensors")
    inner, changed = held.changes(tmp_path / "w.safetensors")
    assert set(inner) == {linear}
    assert set(changed) == {embedding, linear}
    with torch.no_grad():
        before = model(ids).logits
        both = held.put(changed)(ids).logits
        assert model.lm_head.weight is model.model.embed_tokens.weight
        untied = held.put({"lm_head.weight": 2 * weights[embedding]})(ids).logits
        after = held.put({})(ids).logits
    assert not torch.allclose(before, both)
    assert torch.allclose(untied, 2 * before, atol=1e-4)
    assert torch.equal(before, after)
    save_file({"model.norm.bias": torch.ones(64)}, tmp_path / "bad.safetensors")
    with pytest.raises(quality_peers.PeerError, match="does not have"):
        held.changes(tmp_path / "bad.safetensors")


@pytest.mark.parametrize(
    ("ours", "passed"), [(0.5, True), (0.8, False), (0.7, False), (None, False)]
)
def test_verdict(tmp_path: Path, ours: float | None, passed: bool) -> None:
    """0.75 of each peer's damage and 0.9 of the best peer's that is not larger (here 0.75)."""
    rows = Rows(tmp_path / "rows.json", {})

    def point(name: str, size: int, kl: float, bits: float = 3.0) -> None:
        sizes = {"linear_bytes": size, "outer_bytes": 5, "other_bytes": 5}
        row = {"peer": "p", "point": name, "bits": bits, "total": {"kl": kl}}
        rows.peers[f"m|p|{name}"] = row | sizes

    point("small", 80, 0.75)
    point("large", 90, 1.0)
    point("not counted", 95, 0.1, bits=4.7)
    if ours is not None:
        rows.ours["m|total|best|100"] = {"bytes": 99, "kl": ours}
    judged = {row["point"]: row for row in rows.judged("m", "total", "best")}
    assert judged["large"]["passed"] is passed
    assert judged["large"]["best"]["point"] == "small"
    assert judged["not counted"]["passed"] is None
