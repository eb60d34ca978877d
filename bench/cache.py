"""KV policies: damage against bytes of the cache on long text, next to kvpress and transformers.

    python bench/cache.py --text wikitext2-test.txt [--peers INTERPRETER] [--windows 4]
                          [--only NAME] [--work DIR] [--report]

SmolLM2 with its 4-bit grid broken (regrid.py), float32, on a CPU. Windows of 2,048 tokens of the
text's first 60%, evenly spaced: 1,536 are the prompt, the last 512 are read 32 at a time and each
of their positions is scored against full attention. Every policy of TABLE that the catalog has is
measured in both protocols of cache_protocol.py; in "whole" the prompt's queries, keys and values
come from one pass that all policies share, since a chunk sees itself as it is. The peers
(cache_peers.py) run with an interpreter of their own on the same ids, beside ours, each on half of
the cores. cache_reuse.py measures text put together from chunks and edited. Rows are kept in
WORK/rows.json window by window, and a run that was interrupted goes on. Writes
bench/results/cache.{json,png} and docs/cache.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from cache_protocol import CHUNK, PROMPT, WINDOW, Score, scored
from cache_table import write
from ladder_vs_uniform import regridded_smollm2
from pliant.api import opened
from pliant.cache.limited import LimitedModel, attention
from pliant.cache.policy import Entries, Layer, Policy, policies
from pliant.errors import PliantError
from pliant.model import open_checkpoint
from pliant.observe import load_text, split, windows
from texts import spread

HALF, QUARTER = {"tokens": PROMPT // 2}, {"tokens": PROMPT // 4}
TABLE: dict[str, list[dict[str, Any]]] = {
    "keep": [{}],
    "uniform": [{"bits": 4}, {"bits": 2}],
    "kvquant": [{"bits": 4}, {"bits": 3}, {"bits": 2}],
    "million": [{"bits": 4}, {"bits": 2}],
    "waterfill": [{"keys": 2.5, "values": 3.0}, {"keys": 1.5, "values": 2.0}],
    "mustafar": [{"keys": 0.5, "values": 0.5}, {"keys": 0.3, "values": 0.3}],
    "cskv": [{"keys": 0.5, "values": 0.5}, {"keys": 0.75, "values": 0.75, "bits": 4}],
    "h2o": [HALF, QUARTER],
    "raas": [HALF, QUARTER],
    "rkv": [HALF, QUARTER],
    "ems": [HALF, QUARTER],
    "citrus": [HALF, QUARTER],
    "zeromerge": [HALF, QUARTER],
    "chelsea": [HALF, QUARTER],
    "elastic": [HALF, QUARTER],
    "lm_infinite": [HALF, QUARTER],
    "squeezed": [{"share": 0.25}, {"share": 0.125}],
    "louiskv": [{"share": 0.25}, {"share": 0.125}],
}
"""What is measured of each policy: in the protocol "whole" all, in "parts" the last alone. Names
that the catalog lacks are told and left out."""


def main() -> None:
    arguments = parsed()
    work = Path(arguments.work)
    work.mkdir(parents=True, exist_ok=True)
    checkpoint = open_checkpoint(regridded_smollm2())
    text = split(load_text(arguments.text), "evaluation")
    ids = spread(windows(text, checkpoint.tokenizer(), WINDOW), arguments.windows)
    bench = Bench(work / "rows.json", ids)
    if not arguments.report:
        bench.run(opened(checkpoint), work, arguments)
    bench.take(work)
    bench.drop_unlisted()
    write(bench.rows, told(arguments, ids))


class Bench:
    """The windows, and what has been measured on them."""

    def __init__(self, path: Path, ids: Tensor) -> None:
        self.path, self.ids = path, ids
        self.rows: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        digest = hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16]
        if self.rows.setdefault("ids", digest) != digest:
            raise SystemExit(f"{path} is about other text; use another --work")
        for section in ("parts", "whole", "reuse"):
            self.rows.setdefault(section, {})

    def run(self, model: Any, work: Path, arguments: Any) -> None:
        hidden = originals(model, self.ids, work)
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
        peers = self.peers(arguments, work, hidden) if arguments.peers else None
        known = policies()
        wanted = [n for n in TABLE if arguments.only in (None, n)]
        missing = [name for name in wanted if name not in known]
        if missing:
            print(f"not in the catalog: {', '.join(missing)}", flush=True)
        points = [(n, options) for n in wanted if n in known for options in TABLE[n]]
        last = [(n, TABLE[n][-1]) for n in wanted if n in known]
        for index, window in enumerate(self.ids):
            for name, options in last:
                key, row = self.row("parts", known[name], options)
                if str(index) not in row["windows"]:
                    limited = made(model, name, options)
                    score = Score(model.lm_head, hidden[index])
                    self.keep("parts", key, index, in_parts, limited, window, score)
            todo = [(n, o) for n, o in points
                    if str(index) not in self.row("whole", known[n], o)[1]["windows"]]  # fmt: skip
            prompt = Prompt(model, window) if todo else None
            for name, options in todo:
                key, _ = self.row("whole", known[name], options)
                limited = made(model, name, options)
                score = Score(model.lm_head, hidden[index])
                self.keep("whole", key, index, at_once, limited, window, score, prompt)
        if peers and peers.wait():
            print("the peers' script failed; its rows so far are taken", flush=True)
        if arguments.only in (None, "reuse"):
            from cache_reuse import measure_reuse

            measure_reuse(model, self.ids, hidden, self.rows["reuse"], self.save)

    def row(self, protocol: str, info: Any, options: dict[str, Any]) -> tuple[str, Any]:
        key = f"{info.name}|{json.dumps(options)}"
        fresh = {"name": info.name, "kind": info.kind, "paper": info.paper, "options": options,
                 "windows": {}}  # fmt: skip
        return key, self.rows[protocol].setdefault(key, fresh)

    def keep(self, protocol: str, key: str, index: int, measure: Any, *given: Any) -> None:
        row = self.rows[protocol][key]
        try:
            row["windows"][str(index)] = found = measure(*given)
            row.pop("failed", None)
            print(f"window {index} {protocol} {key}: KL {found['kl']:.4f}, "
                  f"{found['bytes_end'] / WINDOW:.0f} bytes a token, {found['seconds']:.0f} s",
                  flush=True)  # fmt: skip
        except PliantError as error:
            row["failed"] = str(error)
            print(f"{key}: {error}", flush=True)
        self.save()

    def peers(self, arguments: Any, work: Path, hidden: Tensor) -> Any:
        save_file({"ids": self.ids, "hidden": hidden}, work / "windows.safetensors")
        script = Path(__file__).parent / "cache_peers.py"
        chosen = [arguments.only] if arguments.only else []
        command = [arguments.peers, str(script), str(regridded_smollm2()), str(work), *chosen]
        threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        return subprocess.Popen(command, env=os.environ | threads)

    def take(self, work: Path) -> None:
        path = work / "peers.json"
        for row in json.loads(path.read_text()).values() if path.exists() else ():
            own = self.rows[row["protocol"]]
            own[f"{row['name']}|{json.dumps(row['options'])}"] = row | {"peer": True}
        self.save()

    def drop_unlisted(self) -> None:
        """Leave out of the report what TABLE has no more."""
        for protocol in ("parts", "whole"):
            self.rows[protocol] = {
                key: row for key, row in self.rows[protocol].items()
                if row.get("peer") or row["options"] in TABLE.get(row["name"], [])
            }  # fmt: skip

    def save(self) -> None:
        self.path.write_text(json.dumps(self.rows, indent=1))


def made(model: Any, name: str, options: dict[str, Any]) -> LimitedModel:
    return LimitedModel(model, partial(policies()[name].make, **options))


@torch.no_grad()
def originals(model: Any, ids: Tensor, work: Path) -> Tensor:
    """Final hidden states [n, WINDOW - PROMPT, d] with full attention, kept in WORK."""
    path = work / "hidden.pt"
    if path.exists():
        known: Tensor = torch.load(path)
        if len(known) == len(ids):
            return known
    found = torch.stack([model.model(row[None]).last_hidden_state[0, PROMPT:] for row in ids])
    torch.save(found, path)
    return found


def in_parts(limited: LimitedModel, window: Tensor, score: Score) -> dict[str, float]:
    began = time.process_time()
    for part in window[:PROMPT].split(CHUNK):
        limited(part, last=1)
    return finished(limited, window, score, began)


def at_once(
    limited: LimitedModel, window: Tensor, score: Score, prompt: Prompt
) -> dict[str, float]:
    began = time.process_time() - prompt.seconds  # as if each had read it
    prompt.give(limited)
    return finished(limited, window, score, began)


def finished(limited: LimitedModel, window: Tensor, score: Score, began: float) -> dict[str, float]:
    """What follows the prompt, scored. read: share of 16-bit bytes that a step goes through."""
    after_prompt, shares = limited.nbytes, []
    for tokens in scored(window):
        score.add(limited(tokens))
        read = sum(getattr(policy, "read_bytes", policy.nbytes) for policy in limited.policies)
        shares.append(read / sixteen_bits(limited))
    return score.result() | {
        "bytes_prompt": after_prompt,
        "bytes_end": limited.nbytes,
        "share_end": limited.nbytes / sixteen_bits(limited),
        "read": sum(shares) / len(shares),
        "seconds": time.process_time() - began,
    }


def sixteen_bits(limited: LimitedModel) -> int:
    """Bytes of all keys and values so far."""
    layers = (policy.layer for policy in limited.policies)
    return 2 * limited.length * sum(l.kv_heads * (l.key_dim + l.value_dim) for l in layers)


class Prompt:
    """Queries, keys and values of every layer over the prompt of `window`, with full attention."""

    def __init__(self, model: Any, window: Tensor) -> None:
        began = time.process_time()
        recording = LimitedModel(model, Recording)
        recording(window[:PROMPT], last=1)
        self.layers: list[Any] = recording.policies
        self.seconds = time.process_time() - began

    @torch.no_grad()
    def give(self, limited: LimitedModel) -> None:
        """Bring `limited` to where it is after the prompt as one chunk."""
        for policy, known in zip(limited.policies, self.layers, strict=True):
            policy.add(known.entries, known.queries)
            seen = policy.read(known.queries)
            if policy.observes:
                places = torch.arange(PROMPT)
                policy.observe(attention(known.queries, seen, places, policy.layer.scale)[1])
            policy.settle()
        limited.length = PROMPT


class Recording(Policy):
    """Keeps one chunk and its queries as they come."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        self.entries: Any = None

    def add(self, new: Entries, queries: Tensor) -> None:
        self.entries, self.queries = new, queries

    def read(self, queries: Tensor) -> Entries:
        return self.entries

    @property
    def nbytes(self) -> int:
        return 0


def told(arguments: Any, ids: Tensor) -> dict[str, Any]:
    """What the report says of the run."""
    kept = [Path(a).name if "/" in a else a for a in sys.argv[1:]]
    kept = [a for a in kept if a != "--report"]
    machine = f"{platform.machine()} CPU, {os.cpu_count()} cores"
    return {"command": f"python bench/cache.py {shlex.join(kept)}", "date": str(date.today()),
            "machine": machine, "windows": len(ids)}  # fmt: skip


def parsed() -> Any:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--text", required=True, help="WikiText-2's raw test split")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--only", metavar="NAME", help="a policy, a peer, or reuse")
    parser.add_argument("--peers", metavar="INTERPRETER", help="Python with kvpress, hqq, quanto")
    parser.add_argument("--work", default="cache-work", help="rows and what peers read")
    parser.add_argument("--report", action="store_true", help="write the report from known rows")
    return parser.parse_args()


if __name__ == "__main__":
    main()
