#!/usr/bin/env bash
# The data mix of Baichuan-13B-Instruction (three sources, weights by count, see data/mix.yaml) in miniature:
# a nano model with random weights is trained one epoch on it. Arguments are added to those of training.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-out/instruction_mix}
python scripts/make_nano.py "$out/nano" > /dev/null
python -m baichuan_sft.cli train --model_name_or_path "$out/nano" --data_path data/mix.yaml --dedup True \
    --output_dir "$out/tuned" --num_train_epochs 1 --per_device_train_batch_size 4 --model_max_length 128 "$@"
