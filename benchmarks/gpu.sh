#!/usr/bin/env bash
# Everything worth running on one GPU, in a few minutes: first correctness, then memory. Its table comes last.
set -uo pipefail
cd "$(dirname "$0")/.."
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
python -m pytest -q -m gpu tests/test_gpu.py
failed=$?
python benchmarks/head_memory.py --device cuda --rows 4096 --hidden 4096
python benchmarks/head_memory.py --device cuda --rows 16384 --hidden 4096
exit $failed
