#!/usr/bin/env bash
# The main job, end to end, on the bundled SmolLM2-135M: what `make demo` runs.
set -euo pipefail
pliant="${BIN:-.venv/bin}/pliant"
dir="${DEMO_DIR:-demo}"
mkdir -p "$dir"

echo "== What would fit (from the configuration alone)"
"$pliant" plan smollm2 --memory 128MiB --context 2048

echo "== Squeeze it into 128 MiB with a context of 2,048 tokens"
if [ -d "$dir/smollm2-128" ]; then
  echo "$dir/smollm2-128 is there already; 'rm -r $dir' to start over"
else
  "$pliant" fit smollm2 --memory 128MiB --context 2048 -o "$dir/smollm2-128"
fi

echo "== What it cost, measured on text that was not used to make it"
# Python's own manual, which every Python carries, is text that nobody calibrated on.
"${BIN:-.venv/bin}/python" - > "$dir/text.txt" <<'PY'
from pydoc_data.topics import topics
print("\n".join(topics[name] for name in ("objects", "typesfunctions", "execmodel", "try")))
PY
"$pliant" measure "$dir/smollm2-128" --against smollm2 --text "$dir/text.txt" --limit 12 \
  --json > "$dir/measured.json"
"${BIN:-.venv/bin}/python" - "$dir/measured.json" <<'PY'
import json, sys
m = json.load(open(sys.argv[1]))
low, high = m["kl_ci95"]
print(f"  damage (KL)      {m['kl']:.3f} nats a token (95% interval {low:.3f} to {high:.3f})")
print(f"  perplexity       {m['perplexity']:.2f}, the original's {m['perplexity_original']:.2f}")
print(f"  same next token  {m['top1']:.1%} of {m['tokens']:,}")
print(f"  weights          {m['weight_bytes'] / 2**20:.1f} MiB")
print(f"  speed            {m['prefill_tps']:.0f} tokens/s read, {m['decode_tps']:.1f} written")
PY
"$pliant" report "$dir/smollm2-128" -o "$dir/report" --measured "$dir/measured.json"

echo "== Its answer, inside 128 MiB"
"$pliant" run "$dir/smollm2-128" "What is the capital of France, and what is it known for?" \
  --max-new-tokens 60

echo
echo "Pictures and the table: $dir/report/report.html"
