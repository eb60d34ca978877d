"""The peers of bench/cache.py: presses of kvpress and transformers' quantized caches.

    python bench/cache_peers.py --list
    python bench/cache_peers.py MODEL_DIR WORK [NAME ...]

Runs with the peers' own Python (kvpress, hqq and optimum-quanto installed) and never imports
pliant. WORK/windows.safetensors has the token ids and the original's hidden states, as
bench/cache.py writes them; WORK/peers.json gets the rows, and what it has already is not measured
again.

Numbers that a peer keeps in floating point count 2 bytes. Presses that choose tokens for each head
only mask those that they drop; what they drop is not counted.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, QuantizedCache

from cache_protocol import CHUNK, PROMPT, Score, scored

RATIOS = (0.5, 0.75)
_STORED = 2  # bytes of a number in floating point


def presses() -> dict[str, Callable[[float], Any]]:
    """Those of kvpress that lead its leaderboard and need nothing trained for one model."""
    import kvpress as k

    def expected(ratio: float, vnorm: bool) -> Any:
        return k.ExpectedAttentionPress(ratio, epsilon=1e-2, use_vnorm=vnorm)

    return {
        "KVzip": lambda r: k.KVzipPress(r),
        "AdaKV, expected attention": lambda r: k.AdaKVPress(expected(r, True)),
        "CriticalAdaKV, expected attention": lambda r: k.CriticalAdaKVPress(expected(r, False)),
        "AdaKV, SnapKV": lambda r: k.AdaKVPress(k.SnapKVPress(r)),
        "Compactor": lambda r: k.CompactorPress(r),
        "StreamingLLM": lambda r: k.StreamingLLMPress(r),
    }


def points() -> Iterator[tuple[str, str, dict[str, Any], str]]:
    """(name, peer, options, protocol) of every row."""
    for name in presses():
        for ratio in RATIOS:
            yield name, "kvpress", {"ratio": ratio}, "whole"
    for backend in ("quanto", "hqq"):
        for bits in (4, 2):
            for protocol in ("parts", "whole"):
                yield f"QuantizedCache, {backend}", "transformers", {"bits": bits}, protocol


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--list", action="store_true")
    parser.add_argument("model", nargs="?")
    parser.add_argument("work", nargs="?", type=Path)
    parser.add_argument("names", nargs="*", help="only these")
    arguments = parser.parse_args()
    if arguments.list:
        for name, peer, options, protocol in points():
            print(f"{peer}: {name} {options} {protocol}")
        return
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    given = load_file(arguments.work / "windows.safetensors")
    path = arguments.work / "peers.json"
    rows: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    packages = ("kvpress", "transformers", "hqq", "optimum-quanto")
    versions = {package: importlib.metadata.version(package) for package in packages}
    for index, (window, hidden) in enumerate(zip(given["ids"], given["hidden"], strict=True)):
        for name, peer, options, protocol in points():
            key = f"{protocol}|{name}|{json.dumps(options)}"
            row = rows.setdefault(
                key,
                {"name": name, "kind": peer, "options": options, "protocol": protocol,
                 "versions": versions, "windows": {}},
            )  # fmt: skip
            if str(index) in row["windows"] or (arguments.names and name not in arguments.names):
                continue
            try:
                found = measured(
                    model, name, options, protocol, window, Score(model.lm_head, hidden)
                )
            except Exception as error:  # a peer may fail in any way; the others go on
                row["failed"] = f"{type(error).__name__}: {error}"
                print(f"{key}: {row['failed']}", flush=True)
                continue
            row["windows"][str(index)] = found
            print(f"window {index} {key}: KL {found['kl']:.4f}", flush=True)
            path.write_text(json.dumps(rows, indent=1))
    path.write_text(json.dumps(rows, indent=1))


@torch.no_grad()
def measured(
    model: Any, name: str, options: dict[str, Any], protocol: str, window: Tensor, score: Score
) -> dict[str, float]:
    """One row of one window."""
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None
    began, length = time.process_time(), 0

    def read(tokens: Tensor, cache: Any, **more: Any) -> Tensor:
        nonlocal length
        places = torch.arange(length, length + len(tokens))[None]
        length += len(tokens)
        return model(
            input_ids=tokens[None], position_ids=places, past_key_values=cache, **more
        ).logits[0]

    prompt = window[:PROMPT]
    if "ratio" in options:
        cache: Any = DynamicCache()
        with presses()[name](options["ratio"])(model):
            read(prompt, cache, logits_to_keep=1)
    else:
        cache = QuantizedCache(name.split()[-1], model.config, nbits=options["bits"])
        for part in prompt.split(CHUNK if protocol == "parts" else PROMPT):
            read(part, cache, logits_to_keep=1)
    after_prompt = nbytes(model, cache)
    for tokens in scored(window):
        score.add(read(tokens, cache))
    return score.result() | {
        "bytes_prompt": after_prompt,
        "bytes_end": nbytes(model, cache),
        "seconds": time.process_time() - began,
    }


def nbytes(model: Any, cache: Any) -> int:
    """What the cache keeps."""
    if isinstance(cache, QuantizedCache):
        return sum(tensor_bytes(vars(layer)) for layer in cache.layers)
    total = 0
    for layer, block in zip(cache.layers, model.model.layers, strict=True):
        kept = layer.keys.shape[1] * layer.keys.shape[2]
        masked = getattr(block.self_attn, "masked_key_indices", None)
        kept -= 0 if masked is None else len(masked[0])
        total += kept * (layer.keys.shape[-1] + layer.values.shape[-1]) * _STORED
    return total


def tensor_bytes(kept: Any) -> int:
    """Bytes of all tensors in `kept`, through what quanto and hqq wrap them in."""
    if hasattr(kept, "__tensor_flatten__"):
        names, _ = kept.__tensor_flatten__()
        return sum(tensor_bytes(getattr(kept, name)) for name in names)
    if isinstance(kept, Tensor):
        return kept.numel() * (_STORED if kept.is_floating_point() else kept.element_size())
    if isinstance(kept, dict):
        return sum(tensor_bytes(value) for value in kept.values())
    if isinstance(kept, tuple | list):
        return sum(tensor_bytes(value) for value in kept)
    return 0


if __name__ == "__main__":
    sys.exit(main())
