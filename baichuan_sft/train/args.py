"""Flags and config files of `train`: every one is honoured, mapped with a notice, or refused."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser, TrainingArguments

from baichuan_sft.errors import EnvironmentFault, UserError, suggest

ROOT = Path(__file__).parents[2]  # the checkout: the vendor's commands name ds_config.json and data/ from there


@dataclass
class ModelArguments:
    """What is trained."""

    _argument_group_name = "model"

    model_name_or_path: str = field(metadata={"help": "Directory of a Baichuan model (weights, config, tokenizer)."})
    attn: str = field(
        default="sdpa", metadata={"help": "Attention implementation.", "choices": ["sdpa", "eager"]}
    )
    freeze: str | None = field(
        default=None,
        metadata={"help": "Full training only: parameters to keep as they are, shell patterns with commas between."},
    )


@dataclass
class DataArguments:
    """What it is trained on."""

    _argument_group_name = "data"

    data_path: str = field(metadata={"help": "Conversations: JSON array or JSONL files, commas between."})
    data_format: str | None = field(default=None, metadata={"help": "Format of the records; else told by their keys."})
    model_max_length: int = field(default=512, metadata={"help": "Longest conversation, tokens; the rest is cut."})
    train_on: str = field(
        default="all", metadata={"help": "Assistant turns that are learnt.", "choices": ["all", "last"]}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where tokenised data is kept between runs."})


@dataclass
class LoraArguments:
    """LoRA; the names of the variants are PEFT's."""

    _argument_group_name = "LoRA"

    use_lora: bool = field(default=False, metadata={"help": "Train low-rank adapters instead of all weights."})
    lora_preset: str = field(
        default="default",
        metadata={"help": "vendor: rank 1, alpha 32, dropout 0.1, as in Baichuan2's script.", "choices": ["default", "vendor"]},
    )
    lora_rank: int | None = field(default=None, metadata={"help": "Rank r; default 16."})
    lora_alpha: float | None = field(default=None, metadata={"help": "Scale alpha, the update counts alpha / r; default 32."})
    lora_dropout: float | None = field(default=None, metadata={"help": "Dropout before A; default 0.05."})
    lora_target: str = field(default="W_pack", metadata={"help": "Modules, commas between, or all-linear."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by alpha / sqrt(r)."})
    use_dora: bool = field(default=False, metadata={"help": "Weight-decomposed LoRA."})
    init_lora_weights: str = field(default="true", metadata={"help": "true, gaussian, pissa, olora, ... (PEFT)."})


@dataclass
class SftTrainingArguments(TrainingArguments):
    """transformers' TrainingArguments with this project's defaults."""

    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Peak learning rate; default 2e-5 (full) or 2e-4 (LoRA)."}
    )
    report_to: str | None = field(default="none", metadata={"help": "Integrations to report to."})  # type: ignore[assignment]
    logging_steps: float = field(default=1, metadata={"help": "Log every so many updates."})
    adam_beta2: float = field(default=0.98, metadata={"help": "Baichuan2's recipe."})
    weight_decay: float = field(default=1e-4, metadata={"help": "Baichuan2's recipe."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save.", "choices": ["no", "steps", "epoch"]})  # type: ignore[assignment]
    # The loss is checked, and the batch named, at every step; transformers would hide a NaN here.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Leave NaN losses out of the mean."})


LORA_PRESETS = {"default": (16, 32.0, 0.05), "vendor": (1, 32.0, 0.1)}
LEARNING_RATES = {"full": 2e-5, "lora": 2e-4}
SECTIONS = (ModelArguments, DataArguments, LoraArguments, SftTrainingArguments)

# Flags of older transformers that the vendor's and users' scripts still carry: the flag that does the same today.
RENAMED = {"warmup_ratio": "warmup_steps", "evaluation_strategy": "eval_strategy", "no_cuda": "use_cpu"}
GROUP_BY_LENGTH = ("group_by_length", "train_sampling_strategy")
# ... and what became of those that do nothing today.
GONE = {
    "save_safetensors": "checkpoints are always safetensors",
    "logging_dir": "logs go to output_dir/trainer_log.jsonl",
    "overwrite_output_dir": "files of the same name in output_dir are replaced",
}
COMMON = """output_dir num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps learning_rate
    lr_scheduler_type warmup_steps weight_decay max_grad_norm adam_beta1 adam_beta2 adam_epsilon bf16 fp16 tf32
    gradient_checkpointing deepspeed seed logging_steps save_strategy save_steps save_total_limit
    resume_from_checkpoint neftune_noise_alpha report_to use_cpu""".split()


def _number(low: float, strict: bool = False, high: float = math.inf) -> tuple[Callable[[float], bool], str]:
    rule = f"a finite number {'>' if strict else '>='} {low:g}" + (f" and < {high:g}" if high < math.inf else "")
    return (lambda v: math.isfinite(v) and (v > low if strict else v >= low) and v < high), rule


LIMITS = {
    "learning_rate": _number(0, strict=True),
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
    "seed": _number(0),
    "model_max_length": _number(2),
    "lora_rank": _number(1),
    "lora_alpha": _number(0, strict=True),
    "lora_dropout": _number(0, high=1),
    "neftune_noise_alpha": _number(0, strict=True),
}


class _Parser(HfArgumentParser):
    def error(self, message: str):  # type: ignore[override]
        raise UserError(f"{message}. See --help.")


EXAMPLE = """example:
  deepspeed --num_gpus 8 fine-tune/fine-tune.py --model_name_or_path Baichuan2-7B-Base \\
      --data_path data/belle_chat.json --output_dir out --deepspeed ds_config.json --bf16 True --use_lora True

--config FILE reads the same names from YAML or JSON; flags win over it. --help_all lists every flag."""


def build_parser(show_all: bool = False) -> argparse.ArgumentParser:
    """All flags; the help names the common ones unless ``show_all``."""
    parser = _Parser(
        SECTIONS,
        prog="baichuan-sft train",
        description="Fine-tune a Baichuan model on conversations, all weights or LoRA.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file with these flags as keys.")
    parser.add_argument("--help_all", action="help", help="Show every flag and exit.")
    ours = {f.name for section in SECTIONS[:3] for f in dataclasses.fields(section)} | {"config", "help", "help_all"}
    for action in parser._actions:
        if not show_all and action.dest not in ours and action.dest not in COMMON:
            action.help = argparse.SUPPRESS
        elif action.dest == "gradient_checkpointing":
            action.help = "Recompute activations in the backward pass: less memory, about 30 %% more time."
    return parser


@dataclass(frozen=True)
class Settings:
    """One run as asked for: checked, but nothing is loaded and no process group exists yet.

    Attributes:
        training: keyword arguments of ``SftTrainingArguments``.
        notices: what was mapped, chosen or left out, one line each.
    """

    model: ModelArguments
    data: DataArguments
    lora: LoraArguments
    training: dict[str, Any]
    notices: list[str]


def parse(argv: list[str]) -> Settings:
    """Flags, and a config file under them, to Settings.

    Raises:
        UserError: unknown or repeated flag, wrong type, value out of its range, missing file.
        EnvironmentFault: a precision that this machine does not have.
    """
    notices: list[str] = []
    parser = build_parser(show_all="--help_all" in argv)
    known = {option for action in parser._actions for option in action.option_strings}
    argv = _modernise(argv, notices)
    _refuse_unknown_or_repeated(argv, known)
    config = dict(zip(argv, argv[1:])).get("--config")
    if config is not None:
        lines = _modernise(_read_config(config, known), notices)
        given = {word.split("=")[0] for word in argv if word.startswith("--")}
        argv = [word for pair in zip(lines[::2], lines[1::2]) if pair[0] not in given for word in pair] + argv
    values = vars(parser.parse_args(argv))
    _check_limits(values)
    _resolve_paths(values)
    _fit_to_machine(values, notices)
    _fill_defaults(values, notices)
    sections = [{f.name: values[f.name] for f in dataclasses.fields(s) if f.init} for s in SECTIONS]
    return Settings(
        ModelArguments(**sections[0]), DataArguments(**sections[1]), LoraArguments(**sections[2]), sections[3], notices
    )


def _modernise(argv: list[str], notices: list[str]) -> list[str]:
    """Older flags under today's names; ``--x=y`` as two words."""
    words: list[str] = []
    for word in argv:
        name, equals, value = word.partition("=")
        words += [name, value] if word.startswith("--") and equals else [word]
    result, i = [], 0
    while i < len(words):
        name = words[i].removeprefix("--").replace("-", "_") if words[i].startswith("--") else ""
        has_value = i + 1 < len(words) and not words[i + 1].startswith("--")
        if name in GONE:
            notices.append(f"--{name} has no effect any more: {GONE[name]}")
            i += 2 if has_value else 1
        elif name in RENAMED:
            notices.append(f"--{name} is called --{RENAMED[name]} today")
            result.append(f"--{RENAMED[name]}")
            i += 1
        elif name == GROUP_BY_LENGTH[0]:
            wanted = (words[i + 1] if has_value else "true").lower() in ("true", "1", "yes")
            notices.append(f"--{name} is called --{GROUP_BY_LENGTH[1]} today")
            result += [f"--{GROUP_BY_LENGTH[1]}", name if wanted else "random"]
            i += 2 if has_value else 1
        else:
            result.append(f"--{name}" if name else words[i])
            i += 1
    return result


def _refuse_unknown_or_repeated(argv: list[str], known: set[str]) -> None:
    seen: dict[str, str] = {}
    for i, word in enumerate(argv):
        if not word.startswith("--"):
            continue
        if word not in known:
            raise UserError(f"unknown flag {word}{suggest(word, sorted(known)) or ','} see --help.")
        value = argv[i + 1] if i + 1 < len(argv) else ""
        if word in seen and word != "--local_rank":
            raise UserError(f"{word} is given twice, with {seen[word]!r} and {value!r}; keep one.")
        seen[word] = value


def _read_config(path: str, known: set[str]) -> list[str]:
    """The file's entries as ``--key value`` words."""
    import yaml

    if not os.path.isfile(path):
        raise UserError(f"--config {path}: no such file.")
    try:
        entries = yaml.safe_load(Path(path).read_text(encoding="utf-8"))  # JSON is YAML
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else path
        raise UserError(f"{where}: not YAML: {getattr(error, 'problem', error)}.") from None
    if not isinstance(entries, dict):
        raise UserError(f"{path}: expected flags as keys, got {type(entries).__name__}.")
    words: list[str] = []
    for key, value in entries.items():
        if f"--{key}" not in known and key not in {*RENAMED, *GONE, GROUP_BY_LENGTH[0]}:
            raise UserError(f"{path}: unknown key {key!r}{suggest(str(key), [k[2:] for k in known]) or ','} see --help.")
        if isinstance(value, dict | list):
            raise UserError(f"{path}: {key} is a {type(value).__name__}; expected one value, as on the command line.")
        if value is not None:
            words += [f"--{key}", str(value)]
    return words


def _check_limits(values: dict[str, Any]) -> None:
    for name, (holds, rule) in LIMITS.items():
        value = values.get(name)
        if value is not None and not holds(value):
            raise UserError(f"--{name} is {value:g}; it must be {rule}.")
    if values["max_steps"] < -1 or values["max_steps"] == 0:
        raise UserError(f"--max_steps is {values['max_steps']}; it must be >= 1, or -1 for num_train_epochs.")
    if values["bf16"] and values["fp16"]:
        raise UserError("--bf16 and --fp16 are both True; keep one.")
    if values["freeze"] and values["use_lora"]:
        raise UserError("--freeze and --use_lora are both given; LoRA freezes all weights of the model already.")


def find_file(flag: str, path: str) -> str:
    """``path`` as it stands in the working directory, or else in the checkout's root.

    Raises:
        UserError: in neither.
    """
    for candidate in (Path(path), ROOT / path):
        if candidate.exists():
            return str(candidate.resolve())
    raise UserError(f"--{flag} {path}: no such file in {os.getcwd()} or {ROOT}.")


def _resolve_paths(values: dict[str, Any]) -> None:
    values["data_path"] = ",".join(find_file("data_path", path) for path in values["data_path"].split(","))
    if values["deepspeed"]:
        values["deepspeed"] = find_file("deepspeed", values["deepspeed"])
    model = values["model_name_or_path"]
    if not os.path.isdir(model) and not (ROOT / model).is_dir():
        raise UserError(
            f"--model_name_or_path {model}: no such directory. Weights are read from a local directory; "
            "download the model first, code in it is never run."
        )
    values["model_name_or_path"] = find_file("model_name_or_path", model)


def _fit_to_machine(values: dict[str, Any], notices: list[str]) -> None:
    """What this machine cannot honour is left out with a notice where that is safe, else refused."""
    import torch

    on_gpu = torch.cuda.is_available() and not values["use_cpu"]
    capability = torch.cuda.get_device_capability() if on_gpu else (0, 0)
    device = f"{torch.cuda.get_device_name()} ({capability[0]}.{capability[1]})" if on_gpu else "the CPU"
    if values["tf32"] and capability < (8, 0):
        notices.append(f"--tf32 True is left out: {device} has no TF32, it came with compute capability 8.0")
        values["tf32"] = None
    if values["bf16"] and on_gpu and capability < (8, 0):
        raise EnvironmentFault(f"--bf16 True: {device} has no bfloat16; use --fp16 True, or neither for fp32.")
    if values["fp16"] and not on_gpu:
        raise EnvironmentFault("--fp16 True: the CPU trains in bfloat16 or fp32 only; use --bf16 True, or neither.")
    values["use_cpu"] = not on_gpu


def _fill_defaults(values: dict[str, Any], notices: list[str]) -> None:
    kind = "lora" if values["use_lora"] else "full"
    if values["learning_rate"] is None:
        values["learning_rate"] = LEARNING_RATES[kind]
        notices.append(f"learning_rate {values['learning_rate']:g}: the default of {kind} training")
    given = [name for name in ("lora_rank", "lora_alpha", "lora_dropout") if values[name] is not None]
    if given and not values["use_lora"]:
        raise UserError(f"--{given[0]} is given without --use_lora True, and would do nothing.")
    for name, value in zip(("lora_rank", "lora_alpha", "lora_dropout"), LORA_PRESETS[values["lora_preset"]]):
        values[name] = value if values[name] is None else values[name]
    resume = values["resume_from_checkpoint"]
    if resume is not None and resume.lower() in ("true", "false"):
        values["resume_from_checkpoint"] = _newest_checkpoint(values["output_dir"]) if resume.lower() == "true" else None
    elif resume is not None and not os.path.isdir(resume):
        raise UserError(f"--resume_from_checkpoint {resume}: no such directory; True takes the newest in output_dir.")


def _newest_checkpoint(output_dir: str) -> str:
    from transformers.trainer_utils import get_last_checkpoint

    found = get_last_checkpoint(output_dir) if os.path.isdir(output_dir) else None
    if found is None:
        raise UserError(f"--resume_from_checkpoint True: no checkpoint-* in {output_dir}; leave the flag out to begin.")
    return found
