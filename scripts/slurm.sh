#!/usr/bin/env bash
# Never run under SLURM, there was none where this was written; what was run is this shell with a stand-in for `launch`.
#
#   sbatch --nodes 4 --gpus-per-node 8 scripts/slurm.sh --model_name_or_path Baichuan2-13B-Base --data_path train.jsonl \
#       --output_dir /shared/out --deepspeed hpz --bf16 True
#
# The flags are those of `baichuan-sft train`; `baichuan-sft plan` picks them. Takes the steps of the Makefile: installs
# where nothing is installed yet, then trains. The checkout and --output_dir lie where all nodes see them.
#SBATCH --job-name=baichuan-sft
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=baichuan-sft-%j.log
# SIGTERM three minutes before the time is up: training saves, and exits 143
#SBATCH --signal=B:TERM@180
set -euo pipefail

# sbatch runs a copy of this file: the checkout is where it was submitted from
cd "${SLURM_SUBMIT_DIR:?start me with sbatch, from the checkout}"
if [[ ! -f pyproject.toml || ! -d baichuan_sft ]]; then
    echo "error: $PWD is no checkout of baichuan-sft; run sbatch there" >&2
    exit 2
fi
make .venv/installed

case " $* " in *" --resume"*) ;; *) set -- "$@" --resume auto ;; esac # a requeued job goes on where it was
# One srun task per GPU, all of one run. In the background, so that the signal reaches this shell, which passes it on;
# the second wait is for training to save: the first one ends when the signal comes.
.venv/bin/baichuan-sft launch --mode slurm train "$@" &
launched=$!
trap 'kill -TERM "$launched" 2>/dev/null || true' TERM
code=0
wait "$launched" || code=$?
if kill -0 "$launched" 2>/dev/null; then
    code=0
    wait "$launched" || code=$?
fi
exit "$code"
