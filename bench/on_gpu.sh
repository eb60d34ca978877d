#!/usr/bin/env bash
# What is measured on a GPU, in order, each step with a time limit and a log; nothing stops the rest.
#
#   bench/on_gpu.sh kernels OUT            tests, kernels beside their peers, a step, a whole 8B shape
#   bench/on_gpu.sh variants OUT IN GPUS   what training options give (IN/variants-0.json, -1.json ..)
#   bench/on_gpu.sh quality OUT IN         one ladder and lone fits on two GPUs, and their tables
#
# IN holds wikitext2-test.txt, calibration.txt, ids.safetensors and sizes.json (bench/quality.py says
# how they are made). SECONDS_EACH bounds a step. Options of training for `quality`: STEPS, SEQUENCES,
# BATCH, RATE, RATE_FALL, PROMPT, PROMPTED, TEMPERATURE of the ladder; ALONE_STEPS, ALONE_RATE.
set -u
what=$1 out=$(realpath -m "$2") given=$(realpath -m "${3:-.}")
cd "$(dirname "$0")/.."
export PYTHONPATH="${PYTHONPATH:-}:$PWD/src" PYTHONUNBUFFERED=1 PLIANT_GPU_KERNELS=1 HF_HUB_OFFLINE=1
mkdir -p "$out"

step() {  # NAME SECONDS COMMAND...
  local name=$1 limit=$2 began=$SECONDS
  shift 2
  timeout "${SECONDS_EACH:-$limit}" "$@" > "$out/$name.log" 2>&1
  echo "$name: exit $?, $((SECONDS - began)) s; $(tail -n 1 "$out/$name.log" | cut -c1-200)"
}

model() {  # where SmolLM2 with its 4-bit grid broken is; made when absent
  PYTHONPATH="$PYTHONPATH:bench" python3 -c \
    'from ladder_vs_uniform import regridded_smollm2; print(regridded_smollm2())' 2> /dev/null | tail -n 1
}

kernels() {
  step tests-kernels 150 python3 -m pytest -o addopts= -q tests/kernels
  step tests-step 120 python3 -m pytest -o addopts= -q tests/run tests/observe -k "gpu or graph or captured"
  step tests-fit 90 python3 -m pytest -o addopts= -q tests/fit/test_gpu_rungs.py tests/fit/test_tune.py
  step kernels 170 python3 bench/kernels.py --out "$out" --seconds 160 \
    --only check,decode,together,batch,sum,prefill,peers
  step decode 200 python3 bench/decode_gpu.py --out "$out" --bits 4,2
}

variants() {
  local in=$1 gpus=$2 found
  found=$(model)
  for ((gpu = 0; gpu < gpus; gpu++)); do
    CUDA_VISIBLE_DEVICES=$gpu step "variants-$gpu" 1200 python3 bench/training.py --against "$found" \
      --text "$in/calibration.txt" --test "$in/wikitext2-test.txt" --bits 2.3,3,4 --device cuda \
      --variants "$in/variants-$gpu.json" --work "$out/work-$gpu" &
  done
  wait
}

fitted() {  # DIRECTORY RECIPE IN
  python3 - "$(model)" "$1" "$2" "$3" << 'PYTHON'
import sys
from pliant.fit import default_recipe, fit
from pliant.fit.recipe import read_recipe
from pliant.model import open_checkpoint
model, out, recipe, given = sys.argv[1:]
base = default_recipe("best", text=f"{given}/calibration.txt", gpu=True)
fit(model, open_checkpoint(model).nbytes * 9 // 10, out, context=512,
    recipe=read_recipe(recipe, base), device="cuda",
    progress=lambda stage, done, of: done == of and print(f"  {stage}: {done}", flush=True))
PYTHON
}

quality() {
  local in=$1 found options
  found=$(model)
  options="sequences: ${SEQUENCES:-8192}, batch: ${BATCH:-4}, rate_fall: ${RATE_FALL:-1.0}, \
    prompt: ${PROMPT:-64}, prompted: ${PROMPTED:-0.5}, temperature: ${TEMPERATURE:-1.0}"
  echo "tune: {steps: ${STEPS:-12000}, rate: ${RATE:-2.0e-3}, bits: [1.9, 5.0], $options}" > "$out/ladder.yaml"
  for bits in 3.0 4.0; do
    echo "tune: {steps: ${ALONE_STEPS:-3000}, rate: ${ALONE_RATE:-2.0e-3}, bits: [$bits, $bits], $options}" \
      > "$out/alone-$bits.yaml"
  done
  (
    export CUDA_VISIBLE_DEVICES=0
    step fit-ladder 1200 bash -c 'fitted "$@"' _ "$out/ladder" "$out/ladder.yaml" "$in"
    step quality 300 python3 bench/quality.py --ours "$out/ladder" --ours-only --effort best \
      --sizes "$in/sizes.json" --ids "$in/ids.safetensors" --device cuda --work "$out/quality"
    step absolute 120 python3 bench/absolute.py "$out/ladder" --against "$found" \
      --text "$in/wikitext2-test.txt" --device cuda
  ) &
  (
    export CUDA_VISIBLE_DEVICES=1
    for bits in 3.0 4.0; do
      step "fit-alone-$bits" 600 bash -c 'fitted "$@"' _ "$out/alone-$bits" "$out/alone-$bits.yaml" "$in"
    done
  ) &
  wait
  step one_size 200 python3 bench/one_size.py "$out/ladder" --against "$found" --bits 3.0,4.0 \
    --text "$in/calibration.txt" --test "$in/wikitext2-test.txt" --device cuda --work "$out"
  cp bench/results/absolute.* bench/results/one_size.* "$out"
}

export -f fitted model
"$what" "$given" "${@:4}"
