"""Values of flags that are impossible, alone or together; defaults that follow from other flags."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from baichuan_sft.errors import UserError
from baichuan_sft.quantization import require_bitsandbytes
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
    if not values["use_lora"] and Path(values["output_dir"], "adapter_config.json").exists():
        raise UserError(
            f"--output_dir {values['output_dir']}: an adapter lies there; a whole model beside it would be "
            "loaded as its base; choose another directory."
        )
    if values["bf16"] and values["fp16"]:
        raise UserError("--bf16 and --fp16 are both True; keep one.")
    if values["dataloader_persistent_workers"] and not values["dataloader_num_workers"]:
        raise UserError("--dataloader_persistent_workers True needs --dataloader_num_workers of at least 1.")
    if values["freeze"] and values["peak_tflops"]:
        raise UserError("--peak_tflops and --freeze are both given; no MFU is computed with frozen weights.")
    if values["freeze"] and values["use_lora"]:
        raise UserError(
            "--freeze and --use_lora are both given; LoRA freezes all weights of the model already."
        )


def deepspeed_config(path: str) -> dict[str, Any]:
    """
    Raises:
        UserError: not JSON, or not an object.
    """
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}:{error.colno}: not JSON: {error.msg}.") from None
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


def check_bitsandbytes(values: dict[str, Any], parser: argparse.ArgumentParser) -> None:
    """What runs through bitsandbytes, before anything is loaded: that it is there, and that it can work."""
    quantize, optim = values["quantize"], str(values["optim"])
    if quantize:
        if not values["use_lora"]:
            raise UserError(
                f"--quantize {quantize} needs --use_lora True: quantised weights cannot be trained."
            )
        require_bitsandbytes(f"--quantize {quantize}")
        if values["init_lora_weights"].lower() not in tables.PLAIN_LORA_INITS:
            raise UserError(
                f"--init_lora_weights {values['init_lora_weights']} takes the base's weights apart, which "
                f"--quantize {quantize} has rounded; possible are {', '.join(tables.PLAIN_LORA_INITS)}."
            )
    if is_bitsandbytes(optim):
        require_bitsandbytes(f"--optim {optim}")
    if values["deepspeed"] is None:
        return
    zero = deepspeed_config(values["deepspeed"]).get
    if quantize and zero("zero_optimization", {}).get("stage") == 3:
        raise UserError(
            f"--quantize {quantize} is not possible with ZeRO-3 ({values['deepspeed']}): bitsandbytes cannot "
            "split quantised weights over processes. Use ZeRO-2, which splits gradients and optimizer and "
            "keeps the small quantised base in each process; or leave --quantize out."
        )
    if zero("optimizer") and values["optim"] != parser.get_default("optim"):
        raise UserError(
            f'--optim {optim}: {values["deepspeed"]} names an "optimizer" of its own, which would be taken; '
            "remove it there, or leave the flag out."
        )
    offloaded = zero("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") != "none"
    if offloaded and not optim.startswith(("adamw_torch", "adagrad")):
        # accelerate would put DeepSpeed's own Adam in its place, with 32 bits and without a word
        raise UserError(
            f"--optim {optim} is not possible with offload_optimizer ({values['deepspeed']}): DeepSpeed "
            "steps on the CPU with its own AdamW only. Leave the flag out, or remove offload_optimizer."
        )


def is_bitsandbytes(optim: str) -> bool:
    """Whether transformers takes an optimizer of this name from bitsandbytes."""
    return optim.startswith(("paged_", "lion_", "ademamix", "rmsprop_bnb")) or optim in (
        "adamw_bnb_8bit",
        "adamw_8bit",
    )


def check_data(values: dict[str, Any], parser: argparse.ArgumentParser) -> None:
    """Packing and evaluation: what says something about neither is refused, the rest gets its default."""
    if values["streaming"]:
        check_streaming(values)
    longest = values["model_max_length"]
    if values["packing_tokens"] is None:
        whole = values["per_device_train_batch_size"] if is_flat(values) else 1
        values["packing_tokens"] = longest * whole
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


def is_flat(values: dict[str, Any]) -> bool:
    """Whether a micro-batch is one packed row: a long one wastes least, and costs no T x T mask."""
    dense = values["attn"] in ("eager", "sdpa")
    return values["packing"] and values["packing_tokens"] is None and not dense


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
