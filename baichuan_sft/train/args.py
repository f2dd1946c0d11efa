"""The arguments of `train`: sections with their defaults, and what a run was asked for."""

from __future__ import annotations

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
    max_learning_rate: float = field(
        default=1e-2, metadata={"help": "A --learning_rate above this is a slip, and refused."}
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
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "End when so many evaluations in a row were no better than the best before them."},
    )
    eval_answers: int = field(
        default=0,
        metadata={"help": "Answer so many held-out questions before and after, for the run's report."},
    )
    eval_tasks: str | None = field(
        default=None,
        metadata={
            "help": "Benchmarks, or domains of them, to score a small seeded part of before the first update "
            "and after the last; names as in `baichuan-sft eval --list`."
        },
    )
    eval_data_dir: str | None = field(
        default=None, metadata={"help": "The benchmark authors' own files, as of `baichuan-sft eval`."}
    )
    eval_items: int = field(default=50, metadata={"help": "Items of each benchmark."})
    eval_tasks_steps: int | None = field(
        default=None, metadata={"help": "Updates between two scorings, for more than the first and the last."}
    )
    train_sampling_strategy: str | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Order of the rows; default random with packing, else group_by_length. sequential: as "
            "they lie in the files, or in the packing plan.",
            "choices": ["random", "group_by_length", "sequential"],
        },
    )
    max_failed_saves: int = field(
        default=3,
        metadata={"help": "End the run when the disk has not taken so many checkpoints in a row."},
    )
    async_save: bool = field(
        default=True,
        metadata={"help": "Hash a checkpoint's files and put them on disk while training goes on."},
    )
    peak_tflops: float | None = field(
        default=None,
        metadata={"help": "Of one device, in the precision of the run: MFU is of this; default by its name."},
    )
    on_spike: str = field(
        default="stop",
        metadata={
            "help": "At a loss or gradient norm that is not finite, or a norm above grad_norm_limit: stop; "
            "or skip, leave that update out.",
            "choices": ["stop", "skip"],
        },
    )
    grad_norm_limit: float | None = field(
        default=None, metadata={"help": "A gradient norm above this, before clipping, is a spike."}
    )
    rendezvous_timeout: float = field(
        default=120, metadata={"help": "Seconds to wait at the start for all ranks; who is missing is named."}
    )
    peer_timeout: float = field(
        default=20,
        metadata={"help": "Seconds without a sign of life of a rank or host that end the run; 0: never."},
    )
    resume: str = field(
        default="never",
        metadata={
            "help": "auto: go on from the newest whole checkpoint in output_dir, or begin where there is "
            "none; or a checkpoint directory."
        },
    )
    allow_change: str | None = field(
        default=None,
        metadata={"help": "Flags that may differ from those of the resumed run, commas between."},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Begin anew, and remove the checkpoints that are in output_dir."}
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
