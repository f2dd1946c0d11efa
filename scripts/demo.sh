#!/usr/bin/env bash
# The main job in miniature, on any machine: a nano Baichuan2 learns 70 conversations by heart (all weights, ZeRO-3,
# two processes), then a LoRA adapter on W_pack gives it another name, and the result answers.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
out=${1:-out/demo}
port=$((20000 + RANDOM % 20000))

python scripts/make_nano.py "$out/base" --arch baichuan2-7b

# Rows of 128 tokens: packed to the default of 512, the conversations would be four rows and few updates.
echo; echo "== 1/3 all weights, ZeRO-3, two processes"
deepspeed --num_gpus 2 --master_port $port --log_level error fine-tune/fine-tune.py \
    --model_name_or_path "$out/base" --data_path data/belle_chat.json --output_dir "$out/full" \
    --num_train_epochs 30 --per_device_train_batch_size 2 --model_max_length 128 --learning_rate 5e-3 --warmup_steps 0.05 \
    --deepspeed ds_config.json --save_strategy no --logging_steps 10

echo; echo "== 2/3 LoRA on W_pack"
deepspeed --num_gpus 2 --master_port $port --log_level error fine-tune/fine-tune.py \
    --model_name_or_path "$out/full" --data_path data/belle_persona.json --output_dir "$out/lora" \
    --num_train_epochs 100 --per_device_train_batch_size 2 --packing False --warmup_steps 0.05 \
    --learning_rate 2e-2 --max_learning_rate 2e-2 \
    --use_lora True --lora_dropout 0 --deepspeed ds_config.json --save_strategy no --logging_steps 10

echo; echo "== 3/3 the result, through peft's AutoPeftModelForCausalLM"
python -W ignore::FutureWarning scripts/demo_answers.py "$out/lora" data/belle_persona.json
echo; echo "loss curves: $out/full/loss.png $out/lora/loss.png"
echo "talk to it:  .venv/bin/baichuan-sft chat $out/lora"
