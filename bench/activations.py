"""Measure what `pliant.plan.activation_bytes` predicts: how far a prefill makes a process grow.

    python bench/activations.py DIRECTORY [--context 2048] [--chunk 128] [--allocator trim]

DIRECTORY is a Hugging Face model (run in float32) or an artifact of Pliant. The KV cache is
subtracted, so that what is printed is activations. The allocator matters as much as the model:
glibc keeps freed blocks of ever larger chunks, "trim" gives them back after each chunk, and "mmap"
gives each block of 64 KiB or more back when it is freed, at twice the time.
"""

from __future__ import annotations

import argparse
import ctypes
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from pliant.measure import growth_of
from pliant.plan import activation_bytes
from pliant.run.generate import Memory

M_MMAP_THRESHOLD = -3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--allocator", choices=["default", "trim", "mmap"], default="default")
    args = parser.parse_args()
    libc = ctypes.CDLL("libc.so.6")
    if args.allocator == "mmap":
        libc.mallopt(M_MMAP_THRESHOLD, 64 << 10)
    if (args.directory / "ladder.json").exists():
        from pliant.run.live import load

        model = load(args.directory)
    else:
        model = AutoModelForCausalLM.from_pretrained(args.directory, dtype=torch.float32).eval()
    config = model.config.get_text_config(decoder=True)
    ids = torch.randint(0, config.vocab_size, (args.context,)).tolist()
    Memory(model, args.context).extend(ids[:8])  # library buffers and code pages
    libc.malloc_trim(0)
    memory = Memory(model, args.context)

    def work() -> None:
        for start in range(0, len(ids) - 4, args.chunk):
            memory.extend(ids[start : min(start + args.chunk, len(ids) - 4)], args.chunk)
            if args.allocator == "trim":
                libc.malloc_trim(0)
        for token in ids[-4:]:
            memory.extend([token])

    growth = growth_of(work)
    planned = activation_bytes(config, args.context, 1, prefill_chunk=args.chunk)
    measured = growth.bytes - memory.cache.nbytes
    print(json.dumps({"context": args.context, "chunk": args.chunk, "allocator": args.allocator,
                      "kv_cache": memory.cache.nbytes, "measured": measured, "planned": planned,
                      "off_mib": round((measured - planned) / 2**20, 2)}))  # fmt: skip


if __name__ == "__main__":
    main()
