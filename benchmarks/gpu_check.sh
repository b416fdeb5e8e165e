#!/usr/bin/env bash
# The test suite on CUDA and the benchmarks, on a machine with a GPU and no network, in under nine minutes.
# Argument: the python to use, which must hold torch, triton, pytest, hypothesis, rich and matplotlib.
set -euo pipefail
python=${1:-python3}
cd "$(dirname "$0")/.."
"$python" - <<'CHECK'
import sys, torch
if not torch.cuda.is_available():
    sys.exit("gpu-check needs a GPU, and torch sees none")
CHECK
gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))')
TORCH_CUDA_ARCH_LIST=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
export TORCH_CUDA_ARCH_LIST PYTHONPATH=$PWD
out=benchmarks/results/$gpu
mkdir -p "$out"
failed=0
CKPT_KERNELS_BUILD=cuda "$python" setup.py -q build_ext --inplace >"$out/build.log" 2>&1 || { tail -n 30 "$out/build.log"; exit 1; }
"$python" -m ckpt_kernels.cli doctor | tee "$out/doctor.txt" || failed=1
timeout 270 "$python" -m pytest -q -n "$(nproc)" tests -k "not compile and not isa" 2>&1 | tee "$out/tests.txt" | tail -n 25 || failed=1
timeout 110 "$python" -m benchmarks --rounds 15 --seconds 80 --out "$out" || failed=1
timeout 30 "$python" -m benchmarks.predicted "$out/results.json" --columns 4096 --out "$out/predicted.md" || failed=1
timeout 60 "$python" -m benchmarks.layers --rounds 5 --out "$out" || failed=1
timeout 60 "$python" examples/train_lm.py --steps 60 --out "$out" || failed=1
rm -f "$out/build.log"
exit "$failed"
