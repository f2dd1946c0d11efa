"""The arguments of `train`: sections, defaults, limits, and what became of older flags."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from baichuan_sft.attention import BACKENDS
from baichuan_sft.data.arguments import DataArguments
from baichuan_sft.plan import LEVELS
from baichuan_sft.quantization import QUANTIZATIONS


@dataclass
class ModelArguments:
    """What is trained."""

    _argument_group_name = "model"

    model_name_or_path: str = field(
        metadata={"help": "Directory of a Baichuan model (weights, config, tokenizer)."}
    )
    attn: str = field(
        default="auto",
        metadata={
            "help": "Attention; auto picks the fastest that works here, and says why.",
            "choices": ["auto", *BACKENDS],
        },
    )
    checkpointing: str = field(
        default="auto",
        metadata={
            "help": "What backward computes again to save memory: none; selective, all but matrix products "
            "and attention; full, each layer. auto: the first of them that fits.",
            "choices": ["auto", *LEVELS],
        },
    )
    check_reload: bool = field(
        default=True,
        metadata={
            "help": "Load the first save again and compare logits; takes the model's size in host RAM."
        },
    )
    freeze: str | None = field(
        default=None,
        metadata={
            "help": "Full training only: parameters to keep as they are, shell patterns with commas between."
        },
    )


@dataclass
class LoraArguments:
    """LoRA; the names of the variants are PEFT's."""

    _argument_group_name = "LoRA"

    use_lora: bool = field(
        default=False, metadata={"help": "Train low-rank adapters instead of all weights."}
    )
    lora_preset: str = field(
        default="default",
        metadata={
            "help": "vendor: rank 1, alpha 32, dropout 0.1, as in Baichuan2's script.",
            "choices": ["default", "vendor"],
        },
    )
    lora_rank: int | None = field(default=None, metadata={"help": "Rank r; default 16."})
    lora_alpha: float | None = field(
        default=None, metadata={"help": "Scale alpha, the update counts alpha / r; default 32."}
    )
    lora_dropout: float | None = field(default=None, metadata={"help": "Dropout before A; default 0.05."})
    lora_target: str = field(default="W_pack", metadata={"help": "Modules, commas between, or all-linear."})
    quantize: str | None = field(
        default=None,
        metadata={
            "help": "Keep the base in 4 bits (nf4, this is QLoRA) or 8 (int8); not with ZeRO-3.",
            "choices": list(QUANTIZATIONS),
        },
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale by alpha / sqrt(r)."})
    use_dora: bool = field(default=False, metadata={"help": "Weight-decomposed LoRA."})
    init_lora_weights: str = field(
        default="true", metadata={"help": "true, gaussian, pissa, olora, ... (PEFT)."}
    )


@dataclass
class SftTrainingArguments(TrainingArguments):
    """transformers' TrainingArguments with this project's defaults."""

    output_dir: str | None = field(default=None, metadata={"help": "Where the result goes; required."})
    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Peak learning rate; default 2e-5 (full) or 2e-4 (LoRA)."}
    )
    lr_scheduler_type: str = field(  # type: ignore[assignment]
        default="cosine",
        metadata={"help": "Course of the learning rate: cosine, constant, linear, ... (transformers)."},
    )
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "bfloat16; default True on a GPU that has it.", "nargs": "?", "const": True},
    )
    report_to: str | None = field(default="none", metadata={"help": "Integrations to report to."})  # type: ignore[assignment]
    logging_steps: float = field(default=1, metadata={"help": "Log every so many updates."})
    adam_beta2: float = field(default=0.98, metadata={"help": "As in Baichuan2's recipe."})
    weight_decay: float = field(default=1e-4, metadata={"help": "As in Baichuan2's recipe."})
    save_strategy: str = field(
        default="epoch", metadata={"help": "When to save.", "choices": ["no", "steps", "epoch"]}
    )  # type: ignore[assignment]
    eval_strategy: str | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "When to evaluate; default epoch where there is data for it.",
            "choices": ["no", "steps", "epoch"],
        },
    )
    per_device_eval_batch_size: int | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Rows per device; default per_device_train_batch_size."}
    )
    train_sampling_strategy: str | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Order of the rows; default random with packing, else group_by_length. sequential: as "
            "they lie in the files, or in the packing plan.",
            "choices": ["random", "group_by_length", "sequential"],
        },
    )
    peak_tflops: float | None = field(
        default=None,
        metadata={"help": "Of one device, in the precision of the run: MFU is of this; default by its name."},
    )
    # The loss is checked, and the batch named, at every step; transformers would hide a NaN here.
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave NaN losses out of the mean."}
    )


LORA_PRESETS = {"default": (16, 32.0, 0.05), "vendor": (1, 32.0, 0.1)}
LEARNING_RATES = {"full": 2e-5, "lora": 2e-4}
SECTIONS = (ModelArguments, DataArguments, LoraArguments, SftTrainingArguments)

# --init_lora_weights that do not compute on the base's weights.
PLAIN_LORA_INITS = ("true", "false", "gaussian", "orthogonal")

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
    "overwrite_output_dir": "files of the same name in output_dir are replaced",
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
    "the last weights are the result": "load_best_model_at_end metric_for_best_model greater_is_better",
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
EVAL_FLAGS = "eval_strategy eval_steps eval_delay eval_on_start per_device_eval_batch_size".split()
# Where transformers' own words do not say what happens here.
HELP = {
    "per_device_train_batch_size": "Rows per device: packed ones, laid end to end into one where "
    "packing_tokens is not given; conversations with --packing False.",
    "resume_from_checkpoint": "A checkpoint directory, or True: the newest one in output_dir.",
    "save_total_limit": "Keep so many checkpoints, the newest; default all.",
    "deepspeed": "DeepSpeed configuration, e.g. ds_config.json (ZeRO-3); looked for here, then in the root.",
    "eval_steps": "Updates between evaluations with eval_strategy steps; default logging_steps.",
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
    resume_from_checkpoint neftune_noise_alpha report_to use_cpu torch_compile use_liger_kernel""".split()


def _number(low: float, strict: bool = False, high: float = math.inf) -> tuple[Callable[[float], bool], str]:
    rule = f"a finite number {'>' if strict else '>='} {low:g}" + (
        f" and < {high:g}" if high < math.inf else ""
    )
    return (lambda v: math.isfinite(v) and (v > low if strict else v >= low) and v < high), rule


LIMITS = {
    "learning_rate": _number(0, strict=True),
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
    "dataloader_num_workers": _number(0),
    "seed": _number(0),
    "model_max_length": _number(2),
    "max_line_mib": _number(1),
    "max_unpacked_gib": _number(1),
    "preprocessing_num_workers": _number(1),
    "packing_tokens": _number(2),
    "dev_ratio": _number(0, high=1),
    "eval_steps": _number(0, strict=True),
    "eval_delay": _number(0),
    "per_device_eval_batch_size": _number(1),
    "data_seed": _number(0),
    "lora_rank": _number(1),
    "lora_alpha": _number(0, strict=True),
    "lora_dropout": _number(0, high=1),
    "neftune_noise_alpha": _number(0, strict=True),
}


@dataclass(frozen=True)
class Settings:
    """One run as asked for: checked, but nothing is loaded and no process group exists yet.

    Attributes:
        training: keyword arguments of ``SftTrainingArguments``.
        notices: what was mapped, chosen or left out, one line each.
        flat: a packed micro-batch is one row, of as many tokens as the rows it was asked for together.
    """

    model: ModelArguments
    data: DataArguments
    lora: LoraArguments
    training: dict[str, Any]
    notices: list[str]
    flat: bool = False

    def row_shape(self, *, evaluate: bool = False) -> tuple[int | None, int]:
        """Tokens of a row, None where each is one conversation, and rows of a micro-batch."""
        trained = self.training["per_device_train_batch_size"]
        size = self.training["per_device_eval_batch_size"] if evaluate else trained
        if not self.data.packing:
            return None, size
        if not self.flat:
            return self.data.packing_tokens, size
        return self.data.model_max_length * min(size, trained), max(1, size // trained)
