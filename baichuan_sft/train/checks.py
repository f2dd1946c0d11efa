"""Values of flags that are impossible, alone or together; defaults that follow from other flags."""

from __future__ import annotations

import argparse
from typing import Any

from baichuan_sft.errors import UserError
from baichuan_sft.train import args as tables


def check_values(values: dict[str, Any], parser: argparse.ArgumentParser) -> None:
    for name, (holds, rule) in tables.LIMITS.items():
        value = values.get(name)
        if value is not None and not holds(value):
            raise UserError(f"--{name} is {value:g}; it must be {rule}.")
    if values["max_steps"] < -1 or values["max_steps"] == 0:
        raise UserError(f"--max_steps is {values['max_steps']}; it must be >= 1, or -1 for num_train_epochs.")
    for why, names in tables.REFUSED.items():
        for name in names.split():
            if name in values and values[name] != parser.get_default(name):
                raise UserError(f"--{name} {values[name]} is not possible: {why}; leave the flag out.")
    if values["output_dir"] is None:
        raise UserError("--output_dir is missing: where shall the result go?")
    if values["bf16"] and values["fp16"]:
        raise UserError("--bf16 and --fp16 are both True; keep one.")
    if values["dataloader_persistent_workers"] and not values["dataloader_num_workers"]:
        raise UserError("--dataloader_persistent_workers True needs --dataloader_num_workers of at least 1.")
    if values["freeze"] and values["use_lora"]:
        raise UserError(
            "--freeze and --use_lora are both given; LoRA freezes all weights of the model already."
        )


def check_data(values: dict[str, Any], parser: argparse.ArgumentParser) -> None:
    """Packing and evaluation: what says something about neither is refused, the rest gets its default."""
    if values["streaming"]:
        check_streaming(values)
    longest = values["model_max_length"]
    if values["packing_tokens"] is None:
        values["packing_tokens"] = longest
    elif not values["packing"]:
        raise UserError("--packing_tokens is given with --packing False, and would do nothing.")
    elif values["packing_tokens"] < longest:
        raise UserError(
            f"--packing_tokens is {values['packing_tokens']}; it must be >= --model_max_length, {longest}."
        )
    if values["train_sampling_strategy"] is None:
        values["train_sampling_strategy"] = "random" if values["packing"] else "group_by_length"
    evaluates = bool(values["dev_ratio"] or values["eval_data_path"])
    for name in tables.EVAL_FLAGS:
        given = values[name] not in (parser.get_default(name), "no")
        if given and not evaluates:
            raise UserError(f"--{name} {values[name]} needs --dev_ratio or --eval_data_path.")
    if values["dev_ratio"] and values["eval_data_path"]:
        raise UserError("--dev_ratio and --eval_data_path are both given; keep one.")
    if values["eval_strategy"] is None:
        values["eval_strategy"] = "epoch" if evaluates else "no"
    elif evaluates and values["eval_strategy"] == "no" and not values["eval_on_start"]:
        raise UserError("--eval_strategy no: the held-out data would never be used; leave the flag out.")
    if values["eval_steps"] is not None and values["eval_strategy"] != "steps":
        raise UserError(f"--eval_steps {values['eval_steps']:g} needs --eval_strategy steps.")
    if values["per_device_eval_batch_size"] is None:
        values["per_device_eval_batch_size"] = values["per_device_train_batch_size"]


def check_streaming(values: dict[str, Any]) -> None:
    """What cannot be had of data that nobody has seen the end of."""
    if values["max_steps"] < 1:
        raise UserError("--streaming True has no end; say with --max_steps how many updates to take.")
    impossible = {
        "dev_ratio": "pass --eval_data_path",
        "dedup": "run `baichuan-sft data check --dedup True --fix OUT` first",
        "train_sampling_strategy": "the order is drawn while reading",
        "dataloader_num_workers": "the place in the data would be unknown",
        "preprocessing_num_workers": "the process that trains tokenises",
    }
    for name, way_out in impossible.items():
        if values[name]:
            raise UserError(f"--{name} {values[name]} is not possible with --streaming True: {way_out}.")
    if values["eval_strategy"] is None and values["eval_data_path"]:
        raise UserError(
            "--eval_data_path with --streaming True needs --eval_strategy steps and --eval_steps."
        )
