"""Does the process that opens an artifact hold what was planned, no more and no less?

    python bench/memory_agreement.py DIR [--against smollm2] [--runs 3] [--json FILE]

Fresh processes open (a) the artifact at the budget that it was fitted for, and (b) the original:
transformers' ordinary model in the 16-bit dtype of its checkpoint. Each process first loads the
tokenizer and warms the libraries with a tiny random model of the same architecture, plain and
coded, so that pages of shared libraries and thread pools are there before its resident memory is
noted. It then opens the model, fills the context (prefill in chunks up to the last 16 tokens, and
16 decoded) and reports how far resident memory grew: after opening, and at the peak of everything
(the kernel's own high-water mark, reset when counting begins).

Both run through Pliant's KV cache (bfloat16, of the full context), and freed memory goes back to
the system after every chunk, so that they differ by their weights and by the dtype that they
compute in. Planned for the original: its tensors, the same KV cache, and the activations of a
16-bit model; transformers' own start-up is in no plan. Each figure is the median of the runs.

What must hold within 5% (exit status 1 otherwise), with the context full:
    growth of the artifact's process                  against its planned bytes
    growth of the original's less the artifact's      against the difference of planned bytes
    growth of the original's less the artifact's      against the difference of tensor bytes
and the planned bytes must be 97% to 100% of the budget. After opening alone the original has hardly
grown: its weights are mapped from the file, and pages come when they are first used.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MIB = 2**20
DECODED = 16
TOLERANCE = 0.05


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--against", default="smollm2")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=["artifact", "original"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child, args.directory, args.against)))
        return 0
    runs = {
        kind: [spawn(kind, args) for _ in range(args.runs)] for kind in ("artifact", "original")
    }
    found = {kind: median(results) for kind, results in runs.items()}
    report = found | {"checks": checks(found["artifact"], found["original"])}
    show(report)
    text = json.dumps(report, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")
    return 0 if all(check["holds"] for check in report["checks"]) else 1


def spawn(kind: str, args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, str(args.directory), "--against", args.against]
    done = subprocess.run([*command, "--child", kind], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"the process that opens the {kind} failed")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def median(results: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: statistics.median(r[key] for r in results) for key in results[0]}


def checks(artifact: dict[str, Any], original: dict[str, Any]) -> list[dict[str, Any]]:
    def agreement(what: str, measured: float, expected: float) -> dict[str, Any]:
        off = measured / expected - 1
        return {"check": what, "off": off, "holds": abs(off) <= TOLERANCE}

    def less(name: str) -> float:
        return float(original[name] - artifact[name])

    share = artifact["planned"] / artifact["budget"]
    return [
        agreement("growth against plan, artifact", artifact["growth"], artifact["planned"]),
        agreement("growth against plan, original less artifact", less("growth"), less("planned")),
        agreement(
            "growth against tensors, original less artifact", less("growth"), less("tensors")
        ),
        {"check": "plan against budget (-3% to 0)", "off": share - 1, "holds": 0.97 <= share <= 1},
    ]


def show(report: dict[str, Any]) -> None:
    columns = ("weights", "kv_cache", "tensors", "opening", "opened", "growth", "planned")
    print(f"{'MiB':10}" + "".join(f"{name:>10}" for name in columns) + "   prefill    decode t/s")
    for kind in ("artifact", "original"):
        row = report[kind]
        sizes = "".join(f"{row[name] / MIB:10.1f}" for name in columns)
        print(f"{kind:10}{sizes}{row['prefill_tps']:10.1f}{row['decode_tps']:10.1f}")
    for check in report["checks"]:
        print(f"{'ok' if check['holds'] else 'FAILS':6}{check['off']:+7.1%}  {check['check']}")


def child(kind: str, directory: Path, against: str) -> dict[str, Any]:
    """Open, fill the context, decode; bytes of resident memory above those of a warm process."""
    import torch

    from pliant.ladder import Artifact
    from pliant.measure.memory import growth_of, resident_bytes, tensor_bytes
    from pliant.model import open_checkpoint
    from pliant.model.heap import release
    from pliant.plan.memory import PREFILL_CHUNK, activation_bytes, kv_cache_bytes
    from pliant.run import Memory, load

    checkpoint = open_checkpoint(against)
    artifact = Artifact.open(directory)
    budget, config = artifact.budget, checkpoint.config
    if budget is None:
        raise SystemExit(f"{directory} was fitted without a budget")
    source, dtype = checkpoint.directory, checkpoint.dtype
    checkpoint.tokenizer()
    warm(config, dtype)
    del checkpoint, artifact
    gc.collect()
    release()
    before, opened = resident_bytes(), 0
    spent = {"prefill": 0.0, "decode": 0.0}
    held: list[Any] = []

    def opens() -> None:
        if kind == "artifact":
            held.append(load(directory))
        else:
            held.append(original(source, dtype))
        gc.collect()
        release()

    opening = growth_of(opens)
    model, opened = held[0], resident_bytes() - before
    torch.manual_seed(0)
    tokens = torch.randint(0, config.vocab_size, (budget.context,)).tolist()
    memory = Memory(model, budget.context)
    split = len(tokens) - DECODED

    def works() -> None:
        started = time.perf_counter()
        for start in range(0, split, PREFILL_CHUNK):
            memory.extend(tokens[start : min(start + PREFILL_CHUNK, split)])
            release()
        spent["prefill"] = time.perf_counter() - started
        started = time.perf_counter()
        for token in tokens[split:]:
            memory.extend([token])
        spent["decode"] = time.perf_counter() - started

    working = growth_of(works)
    weights, cache = tensor_bytes(model), memory.cache.nbytes
    if kind == "artifact":
        planned = model.plan.planned_bytes
    else:
        planned = weights + kv_cache_bytes(config, budget.context, 1)
        planned += activation_bytes(config, budget.context, 1, dtype_bytes=dtype.itemsize)
    return {
        "budget": budget.memory,
        "weights": weights,
        "kv_cache": cache,
        "tensors": weights + cache,
        "opening": opening.peak - before,
        "opened": opened,
        "growth": max(opening.peak, working.peak) - before,
        "planned": planned,
        "prefill_tps": split / spent["prefill"],
        "decode_tps": DECODED / spent["decode"],
    }


def original(directory: Path, dtype: Any) -> Any:
    """The ordinary model in the dtype of its checkpoint."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


def warm(config: Any, dtype: Any) -> None:
    """Use a tiny model of the architecture, plain from disk and coded, the way the real one is."""
    import copy

    import torch
    from transformers import AutoModelForCausalLM

    from pliant.codes import GroupInt
    from pliant.model import coded_model, find_targets
    from pliant.run import Memory

    small = copy.deepcopy(config)
    for name, value in {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128,
                        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
                        "vocab_size": 512}.items():  # fmt: skip
        if hasattr(small, name):
            setattr(small, name, value)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(small, name, None)
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[:2]
    with tempfile.TemporaryDirectory() as place:
        AutoModelForCausalLM.from_config(small).to(dtype).save_pretrained(place)
        plain = original(Path(place), dtype)
    targets = find_targets(plain)
    codes = {}
    for target in targets:
        q = torch.zeros(target.shape, dtype=torch.uint8)
        codes[target.name] = GroupInt.pack(q, torch.ones(q.shape[0], 1), None, 4, 0)
    others = {
        n: p.data for n, p in plain.named_parameters() if n not in {t.parameter for t in targets}
    }
    for model in (plain, coded_model(small, codes, others)):
        memory = Memory(model, 64)
        memory.extend(list(range(40)), 20)
        memory.extend([1])


if __name__ == "__main__":
    sys.exit(main())
