"""Measuring what `plan.speed` adds up, once for each machine, and keeping it.

Kept in speed.json in the cache directory, under what changes it: the processor and its threads,
torch, the settings of the kernels, and the kernels' sources.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch

from pliant.bench.samples import COMMON, GROUP, Sample
from pliant.bench.stand_in import SAMPLE, StandIn, stand_in_layers
from pliant.bench.timing import Timer, beyond_cache, copies, time_in_step, time_product
from pliant.codes import Code
from pliant.codes.base import one_thread
from pliant.kernels import gpu
from pliant.kernels.cpu.structs import Unsuited, describe
from pliant.ladder import Artifact
from pliant.model import empty_model, find_targets
from pliant.plan import kept
from pliant.plan.bandwidth import processor_name
from pliant.plan.memory import text_config
from pliant.plan.speed import Between, Costs, Product, kind_of, reads

Source = Callable[[], Code]
Progress = Callable[[int, int], None]

STEP, MODULES = "step", "modules"
SECONDS = 0.1  # of timing for each product, about
_ROUNDS = 3  # over all that is timed, so that a burst of other work does not spoil a figure
TIMERS: Mapping[str, Timer] = {STEP: time_in_step, MODULES: time_product}
_FILE = "speed.json"
_LARGEST = 1 << 23  # weights of a sample; a larger matrix is as many times slower as it has rows


def costs_of_artifact(
    artifact: Artifact,
    device: torch.device | str = "cpu",
    *,
    batch: int = 1,
    seconds: float = SECONDS,
    refresh: bool = False,
    progress: Progress | None = None,
) -> Costs | None:
    """What a token costs with any of an artifact's rungs.

    What is not known yet is measured, and with `refresh` all of it. seconds: for each product.
    """
    config = artifact.config()
    sources: dict[Product, Source] = {}
    for target in artifact.targets:
        for rung in artifact.ladder.rungs[target["name"]]:
            product = _product(config, target, rung.meta)
            if product.count and product not in sources:
                sources[product] = _rung_source(artifact, rung.target, rung.index)
    return calibrate(
        config, sources, torch.device(device), batch=batch, seconds=seconds,
        refresh=refresh, progress=progress,
    )  # fmt: skip


def products_of_artifact(artifact: Artifact, allocation: Mapping[str, int]) -> list[Product]:
    """The products of a token at one size."""
    config, rungs = artifact.config(), artifact.ladder.rungs
    found = [
        _product(config, target, rungs[target["name"]][allocation[target["name"]]].meta)
        for target in artifact.targets
    ]
    return [product for product in found if product.count]


def costs_of_config(
    config: Any,
    kinds: Iterable[str],
    device: torch.device | str = "cpu",
    *,
    batch: int = 1,
    seconds: float = SECONDS,
    progress: Progress | None = None,
) -> Costs | None:
    """What a token costs where all matrices have one of `kinds`, names in `samples.COMMON`."""
    sources = {
        product: _sample_source(COMMON[kind], product)
        for kind in kinds
        for product in products_of_config(config, kind)
    }
    return calibrate(
        config, sources, torch.device(device), batch=batch, seconds=seconds, progress=progress
    )


def products_of_config(config: Any, kind: str) -> list[Product]:
    """The products of a token where every matrix is a code of `kind`."""
    return _products(config, kind_of(COMMON[kind](GROUP, GROUP).meta()))


def calibrate(
    config: Any,
    sources: Mapping[Product, Source],
    device: torch.device,
    *,
    batch: int = 1,
    seconds: float = SECONDS,
    refresh: bool = False,
    progress: Progress | None = None,
    timers: Mapping[str, Timer] = TIMERS,
    stand_in: Callable[..., Any] = StandIn,
) -> Costs | None:
    """Costs of the products in `sources` (each with a code to time) in a model of `config`.

    timers: seconds of a product in each way. stand_in: makes the model whose tokens are timed.
    None where this machine's memory does not hold a few layers.
    """
    smalls = [with_layers(config, n) for n in stand_in_layers(config, beyond_cache(device))]
    owns = [_products(small, kind_of(SAMPLE(GROUP, GROUP).meta())) for small in smalls]
    if 2 * sum(p.out * p.width for own in owns for p in own) > psutil.virtual_memory().available:
        return None
    wanted = {p: _sample_source(SAMPLE, p) for p in owns[-1]} | dict(sources)
    kept_all = kept.read(_FILE)
    key, version = f"{machine(device)}, batch {batch}", kernels_version()
    entry: Any = kept_all.get(key, {})
    if refresh or not isinstance(entry, dict) or entry.get("kernels") != version:
        entry = {"kernels": version, "products": {}, "tokens": {}}

    stepped = batch == 1 and (device.type == "cpu" or gpu.wanted())
    ways = [STEP, MODULES] if stepped else [MODULES]
    totals = [entry["tokens"].setdefault(architecture(small), {}) for small in smalls]
    models: dict[int, Any] = {}
    found: dict[str, tuple[Mapping[str, float], Between]] = {}
    timed: set[tuple[str, int]] = set()
    done, of, each = 0, len(ways) * len(wanted) * _ROUNDS, seconds / _ROUNDS

    def tell(steps: int) -> None:
        nonlocal done
        done += steps
        if progress:
            progress(done, of)

    for way in ways:
        products = entry["products"].setdefault(way, {})
        missing = {p: source for p, source in wanted.items() if p.key not in products}
        best: dict[str, float | None] = {}
        for _ in range(_ROUNDS):
            for at, small in enumerate(smalls):
                if way in totals[at] and (way, at) not in timed:
                    continue
                if at not in models:
                    models[at] = stand_in(small, batch, device)
                token = models[at].seconds(way == STEP, each)
                totals[at][way] = _least(totals[at].get(way), token)
                timed.add((way, at))
            if any(total[way] is None for total in totals):
                break
            for product, source in missing.items():
                took = _measure(product, source, way, batch, device, each, timers[way])
                best[product.key] = _lesser(best.get(product.key), took)
                tell(1)
        products |= best
        if any(total[way] is None for total in totals):
            continue
        known = {k: float(v) for k, v in products.items() if v is not None}
        beside = [
            _between(total[way], own, known, small)
            for total, own, small in zip(totals, owns, smalls, strict=True)
        ]
        found[way] = known, beside[0] if len(beside) == 1 else _split(*beside, *smalls)
        if all(product.key in known for product in sources):
            break  # every size of the model runs this way
    tell(of - done)
    kept.write(_FILE, {**kept_all, key: entry})
    return Costs(int(text_config(config).num_hidden_layers), found)


def _measure(
    product: Product,
    source: Source,
    way: str,
    batch: int,
    device: torch.device,
    seconds: float,
    timer: Timer,
) -> float | None:
    """Seconds of a product; None where the way has no kernel for its code."""
    code = source()
    if way == STEP and device.type == "cpu":
        try:
            describe(code)
        except Unsuited:
            return None
    codes = copies(code.to(device), beyond_cache(device))
    x = torch.randn(batch, product.width, device=device).to(compute_dtype(device))
    scale = product.out / code.shape[0]
    if device.type != "cpu":
        try:
            return scale * timer(codes, x, seconds)
        except RuntimeError as error:  # a product that cannot be captured
            if way != STEP or isinstance(error, torch.OutOfMemoryError):
                raise
            torch.cuda.synchronize(device)
            return None
    if way == STEP:
        return scale * timer(codes, x, seconds)
    with one_thread():  # as a running model does outside of the step
        return scale * timer(codes, x, seconds)


def _least(before: Mapping[str, float] | None, now: Mapping[str, float] | None) -> Any:
    """The lesser seconds at each position; None where there are none."""
    return now if not before or now is None else {at: min(before[at], s) for at, s in now.items()}


def _lesser(before: float | None, now: float | None) -> float | None:
    return now if before is None or now is None else min(before, now)


def _between(
    totals: Mapping[str, float], own: list[Product], known: Mapping[str, float], small: Any
) -> Between:
    """What a layer takes beside its products: tokens of the stand-in less its products."""
    layers = int(text_config(small).num_hidden_layers)
    (low, at_low), (high, at_high) = sorted((int(p), s) for p, s in totals.items())
    inside = sum(known[product.key] * product.count for product in own)
    position = max(0.0, (at_high - at_low) / (high - low)) / layers
    return Between((at_low - inside) / layers - position * low, position)


def _split(few: Between, many: Between, fewer: Any, more: Any) -> Between:
    """What a layer takes where two models differ in layers, and what a token takes in both."""
    less, most = (int(text_config(config).num_hidden_layers) for config in (fewer, more))
    layer = (most * many.layer - less * few.layer) / (most - less)
    return Between(layer, many.position, most * (many.layer - layer))


def _products(config: Any, kind: str) -> list[Product]:
    return [
        Product(kind, *target.shape, reads(config, target.kind, bool(target.tied)))
        for target in find_targets(empty_model(config))
        if reads(config, target.kind, bool(target.tied))
    ]


def _product(config: Any, target: Mapping[str, Any], meta: Mapping[str, Any]) -> Product:
    out, width = target["shape"]
    return Product(kind_of(meta), out, width, reads(config, target["kind"], bool(target["tied"])))


def _rung_source(artifact: Artifact, target: str, index: int) -> Source:
    return lambda: artifact.load_code(target, index)


def _sample_source(sample: Sample, product: Product) -> Source:
    rows = min(product.out, max(1, _LARGEST // product.width))
    return lambda: sample(rows, product.width)


def with_layers(config: Any, count: int) -> Any:
    """`config` cut to its first layers."""
    small = copy.deepcopy(config)
    text = text_config(small)
    text.num_hidden_layers = count
    if getattr(text, "layer_types", None):
        text.layer_types = list(text.layer_types)[:count]
    return small


def compute_dtype(device: torch.device) -> torch.dtype:
    """What activations are held in: 32 bits on a CPU, 16 on a GPU."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def architecture(config: Any) -> str:
    """A name for all that the work between a token's products depends on."""
    text = text_config(config)
    fields = (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "head_dim", "intermediate_size", "vocab_size", "num_local_experts", "num_experts_per_tok",
        "sliding_window", "tie_word_embeddings",
    )  # fmt: skip
    return " ".join([text.model_type, *(str(getattr(text, name, None)) for name in fields)])


def machine(device: torch.device) -> str:
    """What a timing depends on, besides the kernels: processor, threads, torch, settings."""
    settings = [
        f"{name}={os.environ[name]}"
        for name in ("PLIANT_NATIVE", "PLIANT_GPU_KERNELS")
        if name in os.environ
    ]
    return ", ".join([processor_name(device), f"torch {torch.__version__}", *settings])


@cache
def kernels_version() -> str:
    """A digest of the sources that a token's products and what is between them run through."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for folder in ("bench", "cache", "codes", "kernels", "run"):
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".h", ".cpp", ".cu"):
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
