"""Tables of `train`'s flags: what became of older ones, what is refused, limits, words of the help."""

from __future__ import annotations

import math
from collections.abc import Callable

# Flags of older transformers that scripts still carry: the flag that does the same today.
RENAMED = {"warmup_ratio": "warmup_steps", "evaluation_strategy": "eval_strategy", "no_cuda": "use_cpu"}
# ... and switches that are one of several choices today: switch -> flag, value of True, value of False.
SWITCHES = {
    "group_by_length": ("train_sampling_strategy", "group_by_length", "random"),
    "gradient_checkpointing": ("checkpointing", "full", "none"),
    "activation_checkpointing": ("checkpointing", "full", "none"),
}
# ... and what became of those that do nothing today.
GONE = {
    "save_safetensors": "checkpoints are always safetensors",
    "logging_dir": "logs go to output_dir/trainer_log.jsonl",
}
# What other toolkits call things, and what they are here.
ELSEWHERE = {
    "load_in_4bit": "--use_lora True --quantize nf4",
    "load_in_8bit": "--use_lora True --quantize int8",
    "use_qlora": "--use_lora True --quantize nf4",
    "qlora": "--use_lora True --quantize nf4",
}
# What would be ignored, or fail in the middle of a run: why -> the flags that stay at their default.
REFUSED = {
    "evaluation computes the loss and nothing else": "do_eval eval_accumulation_steps "
    "eval_do_concat_batches prediction_loss_only include_for_metrics batch_eval_metrics "
    "eval_use_gather_object fp16_full_eval bf16_full_eval",
    "an epoch's last update takes what is left, on all ranks": "dataloader_drop_last accelerator_config",
    "rows come in an order that all ranks know": "dataloader_in_order dataloader_multiprocessing_context",
    "use `baichuan-sft chat`": "do_predict",
    "the head computes the loss itself": "label_smoothing_factor",
    "which kernels there are follows from the model": "liger_kernel_config",
    "the loss is the mean over all targets of an update": "average_tokens_across_devices",
    "the data's columns are fixed": "remove_unused_columns label_names length_column_name",
    "a resumed run goes on where it stopped": "ignore_data_skip",
    "the rows of an update are fixed before training": "auto_find_batch_size",
    "--checkpointing chooses the kind that works": "gradient_checkpointing_kwargs "
    "activation_checkpointing_kwargs",
    "weights are split by DeepSpeed's ZeRO": "fsdp fsdp_config",
    "upload output_dir when it is complete": "push_to_hub hub_model_id hub_token hub_strategy",
}
# What only says how to evaluate.
EVAL_FLAGS = """eval_strategy eval_steps eval_delay eval_on_start per_device_eval_batch_size
    eval_answers""".split()
# Where transformers' own words do not say what happens here.
HELP = {
    "per_device_train_batch_size": "Rows per device: packed ones, laid end to end into one where "
    "packing_tokens is not given; conversations with --packing False.",
    "resume_from_checkpoint": "A checkpoint directory, or True: the newest one in output_dir.",
    "save_total_limit": "Keep so many checkpoints, the newest; default all.",
    "deepspeed": "DeepSpeed file, looked for here, then in the root; or a recipe of recipes/ by name: zero1, "
    'zero2, zero3, offload, hpz. Where it says "auto" or nothing it takes the flag; a value in it takes the '
    "place of a flag that is not given; both given, and different, is refused.",
    "eval_steps": "Updates between evaluations with eval_strategy steps; default logging_steps.",
    "load_best_model_at_end": "The weights of the best evaluation, not the last ones, are the result.",
    "metric_for_best_model": "What best is: loss (default), perplexity or token_accuracy, on held-out data.",
    "greater_is_better": "Follows from metric_for_best_model.",
    "eval_on_start": "Evaluate before the first update too.",
    "max_steps": "Updates in all, instead of num_train_epochs.",
    "optim": "Optimizer; adamw_bnb_8bit has a quarter of AdamW's states, paged_adamw_8bit can leave the GPU.",
    "use_cpu": "Train on the CPU where there is a GPU too.",
    "torch_compile": "Compile each decoder block, for whatever row lengths; not with ZeRO-3.",
    "torch_compile_backend": "inductor (default), aot_eager or eager; turns torch_compile on.",
    "torch_compile_mode": "default or max-autotune-no-cudagraphs; turns torch_compile on.",
    "use_liger_kernel": "Liger's RMSNorm, RoPE and SwiGLU; needs a CUDA GPU and liger-kernel.",
}
# What --help shows of transformers' two hundred flags.
COMMON = """output_dir num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps
    learning_rate lr_scheduler_type warmup_steps weight_decay max_grad_norm optim adam_beta1
    adam_beta2 adam_epsilon bf16 fp16 tf32 deepspeed seed logging_steps save_strategy save_steps
    save_total_limit eval_strategy eval_steps eval_on_start per_device_eval_batch_size
    early_stopping_patience load_best_model_at_end metric_for_best_model eval_answers
    eval_tasks eval_data_dir eval_items eval_tasks_steps
    resume resume_from_checkpoint allow_change overwrite_output_dir neftune_noise_alpha report_to use_cpu
    torch_compile use_liger_kernel""".split()


def _number(low: float, strict: bool = False, high: float = math.inf) -> tuple[Callable[[float], bool], str]:
    rule = f"a finite number {'>' if strict else '>='} {low:g}" + (
        f" and < {high:g}" if high < math.inf else ""
    )
    return (lambda v: math.isfinite(v) and (v > low if strict else v >= low) and v < high), rule


LIMITS = {
    "learning_rate": _number(0, strict=True),
    "max_learning_rate": _number(0, strict=True),
    "peak_tflops": _number(0, strict=True),
    "num_train_epochs": _number(0, strict=True),
    "per_device_train_batch_size": _number(1),
    "gradient_accumulation_steps": _number(1),
    "warmup_steps": _number(0),
    "weight_decay": _number(0),
    "max_grad_norm": _number(0),
    "adam_epsilon": _number(0, strict=True),
    "adam_beta1": _number(0, high=1),
    "adam_beta2": _number(0, high=1),
    "logging_steps": _number(0, strict=True),
    "save_steps": _number(0, strict=True),
    "save_total_limit": _number(1),
    "max_failed_saves": _number(1),
    "dataloader_num_workers": _number(0),
    "seed": _number(0, high=2**32),  # numpy's
    "model_max_length": _number(2),
    "max_line_mib": _number(1),
    "max_unpacked_gib": _number(1),
    "preprocessing_num_workers": _number(1),
    "packing_tokens": _number(2),
    "dev_ratio": _number(0, high=1),
    "early_stopping_patience": _number(1),
    "eval_answers": _number(0),
    "eval_items": _number(1),
    "eval_tasks_steps": _number(1),
    "eval_steps": _number(0, strict=True),
    "eval_delay": _number(0),
    "per_device_eval_batch_size": _number(1),
    "data_seed": _number(0, high=2**32),
    "lora_rank": _number(1),
    "lora_alpha": _number(0, strict=True),
    "lora_dropout": _number(0, high=1),
    "neftune_noise_alpha": _number(0, strict=True),
    "grad_norm_limit": _number(0, strict=True),
    "rendezvous_timeout": _number(0, strict=True),
    "peer_timeout": _number(0),
}
