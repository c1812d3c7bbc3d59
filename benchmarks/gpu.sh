#!/usr/bin/env bash
# What one GPU can answer in under 9 minutes, offline, from a checkout:  benchmarks/gpu.sh [FOLDER] [--budget SECONDS ...]
# Writes gpu.json, gpu.png, targets.txt and gpu.log into FOLDER; peers that are no packages of the image can be brought
# along on PYTHONPATH. PYTHON chooses the interpreter. `--help` has the rest.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

# A checkout that came without its links has files, or nothing, in their places.
for floor in passes codegen runtime; do
  [ -d "$root/rewrite/$floor" ] || { rm -f "$root/rewrite/$floor" && ln -s "../$floor" "$root/rewrite/$floor"; }
done

export REWRITE_BENCH_BEGAN=$EPOCHREALTIME  # the budget counts from here, not from when Python has started
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "${PYTHON:-python3}" "$root/benchmarks/gpu.py" "$@"
