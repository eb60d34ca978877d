"""Whole models decoding on a GPU: the captured step beside transformers' bf16 and torchao's int4.

    python bench/decode_gpu.py [--out DIR] [--only check,ours,bf16,torchao] [--bits 4,2,3,8]

A Llama-3-8B of random weights (no checkpoint is read), batch 1, 512 tokens in and 256 out. Ours:
random group integers, groups of 128, all matrices of one width; greedily without waiting for the
GPU, and with the host reading each token. transformers: bf16, its static cache, torch.compile with
CUDA graphs, greedily without waiting. torchao: the same model with int4 weights (tinygemm). GB/s
counts the bytes of all matrices but the embedding, and the keys and values held.

First it is checked on small models that the step's logits are as near to those in float32 as the
forward's are. Rows are written after each case and kept by later runs (`--only` chooses parts; all
of it takes some minutes, most of them torch.compile's). `--small` runs all of it on a tiny model,
without a GPU too.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("PLIANT_GPU_KERNELS", "1")
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":  # before Triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

# ruff: noqa: E402
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
    StaticCache,
)

from pliant.cache import DenseCache
from pliant.codes import GroupInt, GroupScales
from pliant.codes.packing import PLANES, plane_bytes
from pliant.kernels import matmul
from pliant.kernels.cuda import build
from pliant.model import coded_model, find_targets
from pliant.model.architecture import empty_model
from pliant.run.gpu_step import GraphStep

LLAMA_3_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "tie_word_embeddings": False,
}  # fmt: skip
SMALL = {
    "vocab_size": 1000, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64,
    "max_position_embeddings": 1024, "tie_word_embeddings": False,
}  # fmt: skip
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
SPREAD = 0.02  # standard deviation of a weight


class Results:
    """Rows by name, beside those of runs before."""

    def __init__(self, folder: Path):
        self.path = folder / "decode_gpu.json"
        folder.mkdir(parents=True, exist_ok=True)
        self.rows: dict[str, dict[str, Any]] = {}
        self.device = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU, interpreted"
        if self.path.exists():
            kept = json.loads(self.path.read_text())
            if kept["device"] == self.device:  # rates of two devices do not belong in one table
                self.rows = kept["rows"]

    def add(self, name: str, **row: Any) -> None:
        self.rows[name] = row
        about = {"device": self.device, "torch": torch.__version__}
        self.path.write_text(json.dumps({**about, "rows": self.rows}, indent=1) + "\n")
        self.path.with_suffix(".md").write_text(self.table())
        said = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items())
        print(name, " ".join(said), flush=True)

    def table(self) -> str:
        lines = [
            f"A Llama-3-8B of random weights on {self.device}, batch 1, 512 tokens in, 256 out: "
            "`python bench/decode_gpu.py`.",
            "",
            "| weights | tokens/s | times bf16 | read by the host | ms a token | of it between the "
            "products | GB/s | of a copy |",
            "|---|---|---|---|---|---|---|---|",
        ]
        dense = self.rows.get("bf16 transformers, static cache, compiled", {})
        for name, row in self.rows.items():
            if "tokens_a_second" not in row:
                continue
            rate = row["tokens_a_second"]
            ratio = rate / dense["tokens_a_second"] if "tokens_a_second" in dense else None
            cells = [
                _cell(rate, 1), _cell(ratio, 2), _cell(row.get("read_by_host"), 1),
                _cell(row["ms"], 3), _cell(row.get("between_ms"), 3), _cell(row.get("gbs"), 0),
                _cell(row.get("of_copy"), 2),
            ]  # fmt: skip
            lines.append(f"| {name} | {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"


def _cell(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


# ---- models -------------------------------------------------------------------------------------


def random_code(out: int, width: int, bits: int, group: int = 128) -> GroupInt:
    """Random stored bytes, symmetric, fp16 scales that give weights the usual spread."""
    planes = tuple(
        torch.randint(0, 256, (out, plane_bytes(width, p)), dtype=torch.uint8, device=DEVICE)
        for p in PLANES[bits]
    )
    groups = -(-width // group)
    unit = SPREAD * 12**0.5 / 2**bits
    scales = (torch.rand(out, groups, device=DEVICE) * 0.4 + 0.8).mul_(unit).half()
    return GroupInt(planes, GroupScales((scales,), None, 16, groups), None, width, bits, group)


def random_coded(config: Any, bits: int, dtype: torch.dtype = DTYPE, seed: int = 0) -> Any:
    """A model of random codes in all its matrices, norms near 1, small biases."""
    torch.manual_seed(seed)
    empty = empty_model(config)
    targets = find_targets(empty)
    codes = {t.name: random_code(*t.shape, bits) for t in targets}
    taken = {t.parameter for t in targets} | {n for t in targets for n in t.tied}
    others = {
        name: torch.randn(p.shape, device=DEVICE) * SPREAD + ("norm" in name)
        for name, p in empty.named_parameters()
        if name not in taken
    }
    return coded_model(config, codes, others, dtype).to(DEVICE).eval()


def random_dense(config: Any) -> Any:
    """The model of transformers in 16 bits, made where it runs."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    rotary = type(model.model.rotary_emb)(config)  # its frequencies are no parameters
    model = model.to(DTYPE).to_empty(device=DEVICE).eval()
    model.model.rotary_emb = rotary.to(DEVICE)
    for name, parameter in model.named_parameters():
        parameter.data.normal_(float("norm" in name), SPREAD)
    return model


# ---- correctness --------------------------------------------------------------------------------


@torch.inference_mode()
def check(config: Any, bits: int, tokens: int = 24) -> dict[str, Any]:
    """How far the step's logits and the forward's are from those in float32, relative."""
    exact, model = (random_coded(config, bits, d) for d in (torch.float32, DTYPE))
    step = GraphStep(model)
    ids = torch.randint(0, config.vocab_size, (1, 40 + tokens), device=DEVICE)
    caches = [DenseCache(config, 40 + tokens) for _ in range(3)]
    for one, cache in zip((exact, model, model), caches, strict=True):
        one(input_ids=ids[:, :40], past_key_values=cache)
    logits = torch.empty(config.vocab_size, device=DEVICE)
    ours, theirs = [], []
    for token in ids[0, 40:].tolist():
        given = torch.tensor([[token]], device=DEVICE)
        expected = exact(input_ids=given, past_key_values=caches[0]).logits[0, -1].double()
        found = model(input_ids=given, past_key_values=caches[1]).logits[0, -1].double()
        assert step.run(token, caches[2], logits), "the step did not run"
        theirs.append(float((found - expected).norm() / expected.norm()))
        ours.append(float((logits.double() - expected).norm() / expected.norm()))
    mean, reference = statistics.mean(ours), statistics.mean(theirs)
    assert mean < 1.5 * reference + 1e-4, f"{mean} where the forward has {reference}"
    return {"error": mean, "forward_error": reference, "captured": step.captured}


# ---- timing -------------------------------------------------------------------------------------


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], Any]) -> float:
    synchronize()
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started


def copy_speed(nbytes: int) -> float:
    """GB/s of a device-to-device copy, read and written."""
    source = torch.zeros(nbytes // 4, dtype=torch.int32, device=DEVICE)
    target = torch.empty_like(source)
    took = [seconds(lambda: target.copy_(source)) for _ in range(6)]
    return 2 * source.nbytes / min(took) / 1e9


@torch.inference_mode()
def time_ours(
    config: Any, bits: int, prompt: int, new: int, copy: float, variants: bool = False
) -> dict[str, Any]:
    """variants: also how long a token takes without overlap of kernels, and in other tiles."""
    model = random_coded(config, bits)
    ids = torch.randint(0, config.vocab_size, (1, prompt), device=DEVICE)
    cache = DenseCache(config, prompt + new)

    def prefill() -> None:
        cache.reset()
        model(input_ids=ids, past_key_values=cache, logits_to_keep=1)

    prefill()
    prefill_s = seconds(prefill)
    step = GraphStep(model)
    first = seconds(lambda: step.greedy(1, cache, 2))
    assert step.captured or DEVICE == "cpu", "there is no CUDA graph"
    free, read = list[float](), list[float]()
    logits = torch.empty(config.vocab_size, device=DEVICE)

    def by_host() -> None:
        token = 1
        for _ in range(new):
            assert step.run(token, cache, logits)
            token = int(logits.argmax())

    for times, work in ((free, lambda: step.greedy(1, cache, new)), (read, by_host)) * 3:
        cache.crop(prompt - cache.length)
        times.append(seconds(work))
        assert cache.length == prompt + new
    took = statistics.median(free) / new
    others = {}
    for name, made in {
        "no overlap": {"early": False}, "tile 32": {"tile": 32}, "tile 128": {"tile": 128},
    }.items() if variants else ():  # fmt: skip
        other = GraphStep(model, **made)
        times = []
        for _ in range(3):
            cache.crop(prompt - cache.length)
            times.append(seconds(lambda step=other: step.greedy(1, cache, new)))
        others[name] = min(times[1:]) / new * 1e3
    products = products_seconds(model)
    coded = sum(w.nbytes for w, _ in model.coded_weights.values())
    held = coded - model.get_input_embeddings().weight.nbytes
    kv = cache.nbytes * (prompt + new / 2) / (prompt + new)
    gbs = (held + kv) / took / 1e9
    return {
        "tokens_a_second": 1 / took,
        "read_by_host": new / statistics.median(read),
        "ms": took * 1e3,
        "products_ms": products * 1e3,
        "between_ms": (took - products) * 1e3,
        "gb_read": (held + kv) / 1e9,
        "gbs": gbs,
        "of_copy": gbs / copy,
        "prefill_ms": prefill_s * 1e3,
        "first_call_ms": first * 1e3,
        "overlap": step.early,
        **({"ms_otherwise": others} if others else {}),
    }


def products_seconds(model: Any) -> float:
    """Of the products of one token alone, back to back in a graph."""
    head = model.get_output_embeddings().weight.code
    codes = [
        module.weight.code
        for layer in model.model.layers
        for module in layer.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    inputs = {
        code.shape[1]: torch.randn(1, code.shape[1], device=DEVICE).to(DTYPE)
        for code in [*codes, head]
    }

    def once() -> None:
        for code in [*codes, head]:
            matmul(inputs[code.shape[1]], code)

    if DEVICE != "cuda":
        return seconds(once)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        once()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            once()
        graph.replay()
        times = [seconds(lambda: [graph.replay() for _ in range(10)]) / 10 for _ in range(5)]
    return statistics.median(times)


@torch.no_grad()
def time_compiled(config: Any, model: Any, prompt: int, new: int, copy: float) -> dict[str, Any]:
    """transformers' forward of one token, compiled, on its static cache; the faster way to call."""
    ids = torch.randint(0, config.vocab_size, (1, prompt), device=DEVICE)
    cache = StaticCache(config=config, max_cache_len=prompt + new)

    def following(token: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    compiled = torch.compile(following, mode="reduce-overhead", fullgraph=True)

    def prefill() -> torch.Tensor:
        cache.reset()
        return following(ids)

    def answer(count: int = new) -> None:
        token = prefill()
        for _ in range(count):
            torch.compiler.cudagraph_mark_step_begin()
            token = compiled(token.clone()).clone()

    compile_s = seconds(lambda: answer(4))
    answer(4)
    prefill_s = statistics.median(seconds(prefill) for _ in range(3))
    took = (statistics.median(seconds(answer) for _ in range(3)) - prefill_s) / new
    held = sum(_nbytes(p) for n, p in model.named_parameters() if "embed_tokens" not in n)
    kv = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    gbs = (held + kv) / took / 1e9
    return {
        "tokens_a_second": 1 / took, "ms": took * 1e3, "gb_read": (held + kv) / 1e9, "gbs": gbs,
        "of_copy": gbs / copy, "prefill_ms": prefill_s * 1e3, "compile_s": compile_s,
    }  # fmt: skip


def _nbytes(parameter: Any) -> int:
    """Bytes of a parameter, of its parts if it is a quantized one."""
    names = getattr(parameter, "tensor_data_names", None)
    if names:
        return sum(int(getattr(parameter, name).nbytes) for name in names)
    return int(parameter.nbytes)


def quantized_by_torchao(model: Any) -> str:
    """int4 weights in groups of 128, in the first packing that this machine has; its name."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    reason: Exception | None = None
    for packing in ("tile_packed_to_4d", "plain"):
        try:
            quantize_(model, Int4WeightOnlyConfig(group_size=128, int4_packing_format=packing))
            return packing
        except Exception as error:  # a packing needs a library or a GPU of its own
            reason = error
    raise RuntimeError(f"torchao has no int4 here: {reason}")


# ---- the run ------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--only", default="check,ours,bf16,torchao")
    parser.add_argument("--bits", default="4,2,3,8")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the bench")
    options = parser.parse_args()
    config = LlamaConfig(**(SMALL if options.small else LLAMA_3_8B))
    prompt, new = (20, 4) if options.small else (512, 256)
    results, parts = Results(options.out), options.only.split(",")
    widths = [int(b) for b in options.bits.split(",")]
    if DEVICE == "cuda" and {"check", "ours"} & set(parts):
        with ThreadPoolExecutor() as pool:  # nvcc works on all at once
            list(pool.map(lambda bits: build.library(bits, 0, False), widths))
    copy = copy_speed(1 << 22 if options.small else 1 << 31)
    results.add("copy", gbs=copy)

    def run(part: str, name: str, work: Callable[[], dict[str, Any]]) -> None:
        if part not in parts:
            return
        try:
            results.add(name, **work())
        except Exception as error:
            traceback.print_exc(limit=6)
            results.add(name, failed=f"{type(error).__name__}: {str(error)[:200]}")
        gc.collect()
        if DEVICE == "cuda":
            torch.compiler.reset()
            torch.cuda.empty_cache()

    for family, kind in (("llama", LlamaConfig), ("qwen2", Qwen2Config), ("qwen3", Qwen3Config)):
        for bits in widths if family == "llama" else widths[:1]:
            run("check", f"check {family} {bits} bits", lambda k=kind, b=bits: check(k(**SMALL), b))
    for bits in widths:
        run("ours", f"{bits} bits, groups of 128",
            lambda b=bits: time_ours(config, b, prompt, new, copy, b == widths[0]))  # fmt: skip
    run("bf16", "bf16 transformers, static cache, compiled",
        lambda: time_compiled(config, random_dense(config), prompt, new, copy))  # fmt: skip

    def torchao() -> dict[str, Any]:
        model = random_dense(config)
        packing = quantized_by_torchao(model)
        return time_compiled(config, model, prompt, new, copy) | {"packing": packing}

    run("torchao", "int4 torchao, static cache, compiled", torchao)
    print(results.table())


if __name__ == "__main__":
    main()
