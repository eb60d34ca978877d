"""The ladder against GPTQ at one bit width everywhere, at the same bytes, on a real model.

Linear layers only: embedding and head are left as they are on both sides. Three baselines:

    gptq            as published and as GPTQModel configures it: group 64, min-max ranges,
                    activation order, plain second moments, 16-bit scales
    gptq+clip       the same with each group's range searched
    ours, uniform   Pliant's own rungs (likelihood-weighted moments, small scales) at one width

All calibrate on the same windows of the text's last 30% and are measured on its first 60%
(windows of 512, second half scored). The model is a copy of SmolLM2 whose 4-bit grid is broken
without changing its function (regrid.py says how and why). The ladder is one artifact, opened at
each baseline's linear bytes, and at 2.5 bits' bytes.

    python bench/ladder_vs_uniform.py --text wikitext2-test.txt [--windows 32] [--effort balanced]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from observing import linear_numbers, linear_observations
from pliant.api import opened as opened_model
from pliant.codes import Code, Dense, GroupInt
from pliant.fit import fit
from pliant.fit.recipe import KEEP, Calibration, Recipe, Rule, RungSpec, default_recipe
from pliant.measure import Reference
from pliant.methods import find
from pliant.model import StreamedModel, cache_directory, coded_model, open_checkpoint
from pliant.observe import choose_windows, load_text, split, windows
from pliant.run import load
from regrid import regrid
from texts import spread

RESULTS = Path(__file__).parent / "results"
WIDTHS = (2, 3, 4)
BASELINES: dict[str, tuple[bool, dict[str, Any]]] = {
    "gptq": (False, {"clip": False, "damp": 0.01, "scale_bits": 16}),
    "gptq+clip": (False, {"clip": True, "damp": 0.01, "scale_bits": 16}),
    "ours, uniform": (True, {"scale_bits": 6}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", required=True, help="WikiText-2's raw test split")
    parser.add_argument("--model", default=None, help="HF directory; default: regridded SmolLM2")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--effort", default="balanced")
    parser.add_argument("--work", default=None, help="directory that keeps the artifact")
    arguments = parser.parse_args()
    source = Path(arguments.model) if arguments.model else regridded_smollm2()
    work = Path(arguments.work or tempfile.mkdtemp(prefix="pliant-bench-"))
    work.mkdir(parents=True, exist_ok=True)
    checkpoint = open_checkpoint(source)
    tokenizer = checkpoint.tokenizer()
    text = load_text(arguments.text)
    calibration = work / "calibration.txt"
    calibration.write_text(split(text, "calibration"), encoding="utf-8")
    found = windows(split(text, "evaluation"), tokenizer)
    chosen = spread(found, arguments.windows)

    started = time.time()
    recipe = ladder_recipe(arguments.effort, calibration)
    out = work / "ladder"
    if not out.exists():
        fit(source, "280MiB", out, context=512, recipe=recipe, progress=said)
    print(f"fit: {time.time() - started:.0f} s", flush=True)

    model = StreamedModel(checkpoint, resident=True)
    reference = Reference.of(opened_model(checkpoint), chosen, key=checkpoint.fingerprint())
    ids = calibration_ids(recipe, calibration, tokenizer)
    rows = Rows(work / "rows.json", model, reference)
    for weighted in (False, True):  # one pass of observation serves all that weigh alike
        names = [n for n, (own, _) in BASELINES.items() if own == weighted]
        variants = [(f"{n} {bits} bits", bits, BASELINES[n][1]) for n in names for bits in WIDTHS]
        if all(name in rows.known for name, _, _ in variants):
            continue
        for name, codes in uniform(model, ids, weighted, variants).items():
            size = sum(code.nbytes for code in codes.values())
            for target in model.targets:
                if target.block is None:
                    codes[target.name] = Dense(model.weight(target))
            compared = coded_model(checkpoint.directory, codes, dict(model.others()))
            rows.measure(name, size, compared)
            codes.clear()

    opened = load(out)
    ladder = opened.artifact.ladder
    outside = ladder.fixed_bytes + sum(
        own[0].nbytes for target, own in ladder.rungs.items() if is_outer(target, model)
    )
    numbers = linear_numbers(model)
    wanted = {f"ladder at {name}": r["linear_bytes"] for name, r in rows.known.items()}
    wanted = {n: size for n, size in wanted.items() if not n.startswith("ladder at ladder")}
    # 2.5 code bits with a group of 64: the overhead is that of 3 bits, the integers half a bit less
    wanted["ladder at 2.5 bits"] = rows.known["gptq 3 bits"]["linear_bytes"] - numbers // 16
    for name, size in wanted.items():
        if size + outside < ladder.smallest_bytes or name in rows.known:
            continue
        opened.resize(weights=size + outside)
        used = opened.plan.weight_bytes - outside
        assert used <= size
        rows.measure(name, used, opened)
    finish(list(rows.known.values()), arguments, source.name)


def regridded_smollm2() -> Path:
    source = open_checkpoint("smollm2").directory
    out = cache_directory() / "smollm2-regrid"
    if not (out / "config.json").exists():
        print(f"regrid: logits agree within {regrid(source, out):.1e}", flush=True)
    return out


def ladder_recipe(effort: str, text: Path) -> Recipe:
    base = default_recipe(effort, text=str(text))
    keep = RungSpec(method=KEEP)
    rules = (Rule(kind="embedding", rungs=(keep,)), Rule(kind="head", rungs=(keep,)), *base.rules)
    return base.model_copy(update={"rules": rules})


def calibration_ids(recipe: Recipe, text: Path, tokenizer: Any) -> torch.Tensor:
    """The windows that the ladder's rungs were built from, without those held out for planning."""
    settings: Calibration = recipe.calibration
    found = windows(load_text(text), tokenizer, settings.length)
    wanted = settings.sequences + recipe.search.sequences
    return choose_windows(found, wanted, seed=recipe.seed)[recipe.search.sequences :]


def uniform(
    model: StreamedModel,
    ids: torch.Tensor,
    weighted: bool,
    variants: list[tuple[str, int, dict[str, Any]]],
) -> dict[str, dict[str, Code]]:
    """GPTQ of every linear, group 64, for each variant (name, bits, options)."""
    gptq = find("gptq").function
    codes: dict[str, dict[str, Code]] = {name: {} for name, _, _ in variants}
    for seen in linear_observations(model, ids, frozenset({"second_moment"}), weighted):
        weight = model.weight(seen.target)
        # alike damping next to each other: it is what the factor depends on
        for name, bits, options in variants:
            code = gptq(weight, seen.statistics, bits=bits, group_size=64, **options)
            assert isinstance(code, GroupInt)
            codes[name][seen.target.name] = code
        print(f"  {seen.target.name:60s}", end="\r", flush=True)
    return codes


def is_outer(target: str, model: StreamedModel) -> bool:
    return any(t.name == target and t.block is None for t in model.targets)


class Rows:
    """What was measured, kept in a file so that an interrupted bench goes on."""

    def __init__(self, path: Path, model: StreamedModel, reference: Reference) -> None:
        self._path, self._reference = path, reference
        self._numbers = linear_numbers(model)
        self.known: dict[str, dict[str, Any]] = (
            json.loads(path.read_text()) if path.exists() else {}
        )

    def measure(self, name: str, size: int, compared: Any) -> None:
        found = {"name": name, "linear_bytes": size, "bits": 8 * size / self._numbers}
        found |= self._reference.damage(compared).as_dict()
        low, high = found["kl_ci95"]
        print(
            f"{name:36s} {size:>10d} bytes {found['bits']:.3f} bits  KL {found['kl']:.4f} "
            f"[{low:.4f}, {high:.4f}]  ppl {found['perplexity']:.2f}  top1 {found['top1']:.3f}",
            flush=True,
        )
        self.known[name] = found
        self._path.write_text(json.dumps(self.known, indent=1))


def said(stage: str, done: int, of: int) -> None:
    if done == of:
        print(f"  {stage}: {done}", flush=True)


def finish(rows: list[dict[str, Any]], arguments: Any, model: str) -> None:
    by_name = {r["name"]: r for r in rows}
    ratios = {
        "3 bits (target 0.42)": ratio(by_name, "ladder at gptq 3 bits", "gptq 3 bits"),
        "4 bits (target 0.48)": ratio(by_name, "ladder at gptq 4 bits", "gptq 4 bits"),
        "2.5 bits against gptq at 3 (target 1.0)": ratio(
            by_name, "ladder at 2.5 bits", "gptq 3 bits"
        ),
        "3 bits, against gptq+clip": ratio(
            by_name, "ladder at gptq+clip 3 bits", "gptq+clip 3 bits"
        ),
        "4 bits, against gptq+clip": ratio(
            by_name, "ladder at gptq+clip 4 bits", "gptq+clip 4 bits"
        ),
        "3 bits, against our uniform rungs": ratio(
            by_name, "ladder at ours, uniform 3 bits", "ours, uniform 3 bits"
        ),
        "4 bits, against our uniform rungs": ratio(
            by_name, "ladder at ours, uniform 4 bits", "ours, uniform 4 bits"
        ),
    }
    for name, value in ratios.items():
        print(f"{name:45s} {value:.3f}")
    RESULTS.mkdir(exist_ok=True)
    stem = RESULTS / "ladder_vs_uniform"
    stem.with_suffix(".json").write_text(
        json.dumps({"model": model, "effort": arguments.effort, "rows": rows, "ratios": ratios},
                   indent=1)
    )  # fmt: skip
    lines = [
        f"# Ladder against uniform GPTQ: {model}, effort {arguments.effort}",
        "",
        f"`python bench/ladder_vs_uniform.py --text wikitext2-test.txt --windows "
        f"{arguments.windows} --effort {arguments.effort}`",
        "",
        "| linears | bytes | bits | KL (nats/token) | 95% interval | perplexity | top-1 |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        low, high = r["kl_ci95"]
        lines.append(
            f"| {r['name']} | {r['linear_bytes']} | {r['bits']:.3f} | {r['kl']:.4f} | "
            f"{low:.4f} to {high:.4f} | {r['perplexity']:.2f} | {r['top1']:.3f} |"
        )
    lines += ["", "| damage of the ladder over the baseline's, same bytes | ratio |", "|---|---|"]
    lines += [f"| {name} | {value:.3f} |" for name, value in ratios.items()]
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")
    plot(rows, stem.with_suffix(".png"))


def ratio(rows: dict[str, dict[str, Any]], ours: str, theirs: str) -> float:
    return float(rows[ours]["kl"] / rows[theirs]["kl"])


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), dpi=150)
    groups = {"ladder": [r for r in rows if r["name"].startswith("ladder")]}
    groups |= {n: [r for r in rows if r["name"].startswith(f"{n} ")] for n in BASELINES}
    for name, own in groups.items():
        own = sorted(own, key=lambda r: r["bits"])
        axes.plot([r["bits"] for r in own], [r["kl"] for r in own], "o-", label=name)
    axes.set_yscale("log")
    axes.set_xlabel("bits a weight of the linear layers, scales and zero points included")
    axes.set_ylabel("damage: KL, nats a token")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
