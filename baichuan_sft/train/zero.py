"""The DeepSpeed file of a run: read, checked by DeepSpeed's own models, brought into line with the flags.

What both can say is said once. A key that the file lacks, or has as "auto", takes the flag's value; a value
in the file takes the place of a flag that nobody gave; two that differ are refused. The file as it was
used lies in output_dir/ds_config.json, without "auto", and repeats the run.
"""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path
from typing import Any

from baichuan_sft.data.findings import RecordFault
from baichuan_sft.data.json_text import RawRecord, decode, locate
from baichuan_sft.errors import UserError, pick
from baichuan_sft.train.config_file import ROOT, find_file

RECIPES = ROOT / "recipes"
RESOLVED = "ds_config.json"
# What the file and a flag both say: key of the file -> flag, type of the value.
TWINS: dict[str, tuple[str, Any]] = {
    "train_micro_batch_size_per_gpu": ("per_device_train_batch_size", int),
    "gradient_accumulation_steps": ("gradient_accumulation_steps", int),
    "gradient_clipping": ("max_grad_norm", (int, float)),
    "fp16.enabled": ("fp16", bool),
    "bf16.enabled": ("bf16", bool),
    "optimizer.type": ("optim", str),
    "optimizer.params.lr": ("learning_rate", (int, float)),
    "optimizer.params.betas.0": ("adam_beta1", (int, float)),
    "optimizer.params.betas.1": ("adam_beta2", (int, float)),
    "optimizer.params.eps": ("adam_epsilon", (int, float)),
    "optimizer.params.weight_decay": ("weight_decay", (int, float)),
    "scheduler.type": ("lr_scheduler_type", str),
    "scheduler.params.warmup_max_lr": ("learning_rate", (int, float)),
    "scheduler.params.warmup_num_steps": ("warmup_steps", int),
}
# Other keys that may be "auto": what they become follows from the flags, the model, the hosts.
SCHEDULE = ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps")
HIDDEN = {  # of zero_optimization, by the model's width; transformers' numbers
    "reduce_bucket_size": lambda width: width * width,
    "stage3_prefetch_bucket_size": lambda width: int(0.9 * width * width),
    "stage3_param_persistence_threshold": lambda width: 10 * width,
}
AUTO = {
    *TWINS,
    "train_batch_size",
    "optimizer.params.betas",
    "zero_optimization.zero_hpz_partition_size",
    *(f"zero_optimization.{name}" for name in HIDDEN),
    *(f"scheduler.params.{name}" for name in SCHEDULE),
} - {"optimizer.type", "scheduler.type"}


# --- the file ---------------------------------------------------------------------------------------


def find_recipe(word: str) -> str:
    """Path of a DeepSpeed file, or of the recipe of this name.

    Raises:
        UserError: neither exists; the recipes are listed.
    """
    if os.path.exists(word) or os.path.basename(word) != word or word.endswith(".json"):
        return find_file("deepspeed", word)
    return str(pick("ZeRO recipe", word, {path.stem: path for path in RECIPES.glob("*.json")}))


def deepspeed_config(path: str) -> dict[str, Any]:
    """
    Raises:
        UserError: not JSON, with the line shown, or not an object.
    """
    data = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        config = decode(data)
    except RecordFault as fault:
        found = locate(RawRecord(0, 1, 1, data, 0), fault, path)
        line, column = found.line or 1, found.column or 1
        text = data.decode("utf-8", "replace").splitlines()[line - 1 : line] or [""]
        shown = text[0][max(0, column - 60) : column + 40].strip()
        raise UserError(f"{path}:{line}:{column}: {found.text}: {shown}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected an object, got {type(config).__name__}.")
    return config


def zero_stage(path: str | None) -> int:
    """ZeRO stage of a DeepSpeed configuration file; 0 without one.

    Raises:
        UserError: not JSON, or a stage 3 whose save would hold no weights.
    """
    zero = {} if path is None else deepspeed_config(path).get("zero_optimization", {})
    if zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise UserError(
            f"{path}: ZeRO stage 3 saves no whole weights without "
            '"stage3_gather_16bit_weights_on_model_save": true; add it to zero_optimization.'
        )
    return zero.get("stage", 0)


def completed(path: str) -> dict[str, Any]:
    """The file with "auto" where it is silent of what a flag says; DeepSpeed would take its own defaults.

    Those are: no gradient clipping, fp32, a learning rate of 1e-3.
    """
    config = deepspeed_config(path)
    for name in ("train_batch_size", "train_micro_batch_size_per_gpu"):
        config.setdefault(name, "auto")
    for name in ("gradient_accumulation_steps", "gradient_clipping"):
        config.setdefault(name, "auto")
    for name in ("fp16", "bf16"):
        config.setdefault(name, {}).setdefault("enabled", "auto")
    if optimizer := config.get("optimizer"):
        is_adam = any(name in optimizer["type"].lower() for name in ("adam", "lamb"))
        params = ("lr", "weight_decay", "betas", "eps") if is_adam else ("lr", "weight_decay")
        optimizer["params"] = dict.fromkeys(params, "auto") | optimizer.get("params", {})
    if scheduler := config.get("scheduler"):
        takes = inspect.signature(schedules()[scheduler["type"]]).parameters
        known = {name: "auto" for name in SCHEDULE if name in takes}
        scheduler["params"] = known | scheduler.get("params", {})
    return config


def value_at(config: Any, key: str) -> Any:
    """The value under ``a.b.0``; None where there is none."""
    for name in key.split("."):
        if isinstance(config, list):
            config = config[int(name)] if int(name) < len(config) else None
        else:
            config = config.get(name) if isinstance(config, dict) else None
    return config


def schedules() -> dict[str, Any]:
    from deepspeed.runtime import lr_schedules

    return {name: getattr(lr_schedules, name) for name in lr_schedules.VALID_LR_SCHEDULES}


# --- file and flags ---------------------------------------------------------------------------------


def agree(values: dict[str, Any], given: set[str], places: dict[str, str], notices: list[str]) -> None:
    """Give each flag that nobody gave the file's value, before anything is derived from it.

    Args:
        given: names of the flags on the command line or in --config.
        places: of flags given in a file, where; those taken from the DeepSpeed file are added.
    Raises:
        UserError: both are given and differ; all of it as one table.
    """
    path = values["deepspeed"]
    config, refused = deepspeed_config(path), False
    rows: list[tuple[str, ...]] = []
    taken: dict[str, str] = {}
    given = set(given)
    for key, (flag, kind) in TWINS.items():
        value, ours = value_at(config, key), values[flag]
        if value in (None, "auto") or (value == ours and kind is not str):
            continue
        if flag in given:
            refused, wins = True, "neither, both are given"
        elif kind is str:
            wins = "the file, with DeepSpeed's own"
        else:
            wins = "the file, the flag is not given"
            values[flag], taken[f"--{flag}"] = value, f"{path}, {key}"
            given.add(flag)
        shown = "by the default" if ours is None else ours
        rows.append((key, json.dumps(value), f"--{flag} {shown}", wins))
    table = _table(("key", "file", "flag", "wins"), rows)
    if refused:
        raise UserError(
            f'{path} and the flags differ; leave the flag out, or write "auto" in the file:\n{table}'
        )
    if rows:
        notices.append(f"{path} and the flags differ:\n{table}")
    places |= taken
    _agree_on_batch(path, config.get("train_batch_size", "auto"), values, given, notices)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    return "\n".join(
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
        for row in (head, *rows)
    )


def _agree_on_batch(
    path: str, total: Any, values: dict[str, Any], given: set[str], notices: list[str]
) -> None:
    """``train_batch_size`` is a product; accumulation that nobody gave follows from it."""
    micro, steps = values["per_device_train_batch_size"], values["gradient_accumulation_steps"]
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if total == "auto" or total == micro * steps * world or micro < 1:
        return
    if type(total) is not int or total < 1:
        raise UserError(f"{path}: train_batch_size is {json.dumps(total)}; it must be a whole number >= 1.")
    nearest = max(1, round(total / (micro * world)))
    product = nearest * micro * world
    if product == total and "gradient_accumulation_steps" not in given:
        values["gradient_accumulation_steps"] = nearest
        notices.append(
            f"gradient_accumulation_steps {nearest}: train_batch_size {total} of {path} is "
            f"{micro} x {nearest} x world {world}"
        )
        return
    way = f"--gradient_accumulation_steps {nearest}"
    way += "" if product == total else f' with "train_batch_size": {product}'
    raise UserError(
        f"{path}: train_batch_size {total} != {micro} x {steps} x world {world} = {micro * steps * world} "
        f'(rows per device, accumulation, processes); nearest: {way}; "auto" always fits.'
    )


def resolve(path: str | None, args: Any, model_config: Any) -> None:
    """Fill in what is still "auto", and write the file as it is used, for the next run to start from.

    Args:
        path: of the user's file, which is not written over.
        args: transformers' arguments, which have filled in what follows from flags.
    Raises:
        UserError: the GPUs per host are not known.
    """
    if path is None:
        return
    config = args.hf_deepspeed_config.config
    zero = config.get("zero_optimization", {})
    for name, of_width in HIDDEN.items():
        if zero.get(name) == "auto":
            zero[name] = of_width(model_config.hidden_size)
    if zero.get("zero_hpz_partition_size") == "auto":
        zero["zero_hpz_partition_size"] = _processes_per_host(args.world_size)
    written = Path(args.output_dir, RESOLVED)
    if args.process_index == 0 and not (written.exists() and written.samefile(path)):
        # accelerate turns "steps_per_print" off with an infinity, which no JSON has
        used = {name: value for name, value in config.items() if name != "steps_per_print"}
        text = json.dumps(used, indent=2, allow_nan=False)
        written.write_text(text + "\n", encoding="utf-8")


def _processes_per_host(world_size: int) -> int:
    """As DeepSpeed's launcher or torchrun says it; on a CPU accelerate adds torchrun's name with a 1."""
    number = os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", ""))
    if not number and world_size > 1:
        raise UserError(
            'zero_hpz_partition_size is "auto", and the launcher sets no LOCAL_WORLD_SIZE; write the '
            "number of GPUs per host in the DeepSpeed file."
        )
    return int(number or 1)
