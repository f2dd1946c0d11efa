"""Values of flags that are impossible, alone or together; defaults that follow from other flags."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import SchedulerType
from transformers.training_args import OptimizerNames

from baichuan_sft.commit import COMMIT, MANIFEST
from baichuan_sft.errors import EnvironmentFault, UserError, pick
from baichuan_sft.quantization import require_bitsandbytes
from baichuan_sft.train import args as tables
from baichuan_sft.train import flags
from baichuan_sft.train.zero import deepspeed_config


def check_values(values: dict[str, Any], parser: argparse.ArgumentParser) -> None:
    for name, (holds, rule) in flags.LIMITS.items():
        value = values.get(name)
        if value is not None and not holds(value):
            raise UserError(f"--{name} is {value:g}; it must be {rule}.")
    for name, kind in (("lr_scheduler_type", SchedulerType), ("optim", OptimizerNames)):
        word = getattr(values[name], "value", values[name])
        pick(f"--{name}", word, {choice.value: choice for choice in kind})
    _check_course(values)
    if values["max_steps"] < -1 or values["max_steps"] == 0:
        raise UserError(f"--max_steps is {values['max_steps']}; it must be >= 1, or -1 for num_train_epochs.")
    for why, names in flags.REFUSED.items():
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
    if values["dataloader_num_workers"]:
        _check_worker_sockets(tempfile.gettempdir())
    if values["freeze"] and values["peak_tflops"]:
        raise UserError("--peak_tflops and --freeze are both given; no MFU is computed with frozen weights.")
    if values["freeze"] and values["use_lora"]:
        raise UserError(
            "--freeze and --use_lora are both given; LoRA freezes all weights of the model already."
        )


def require_no_model_lost(model: str, output_dir: str) -> None:
    """
    Raises:
        UserError: the result would overwrite the base, or a model that this toolkit has not trained.
    """
    out = Path(output_dir)
    if out.exists() and out.samefile(model):
        raise UserError(
            f"--output_dir {out} is --model_name_or_path too: the result would overwrite the base; "
            "choose another directory."
        )
    weights = [path.name for kind in ("model*.safetensors", "pytorch_model*.bin") for path in out.glob(kind)]
    trained = any((out / name).exists() for name in ("run.json", "trainer_log.jsonl"))
    unfinished = (out / MANIFEST).exists() and not (out / COMMIT).exists()  # a run killed while it saved
    if weights and not trained and not unfinished:
        raise UserError(
            f"--output_dir {out} holds a model of another origin ({weights[0]}, no run.json), which would be "
            "overwritten; choose another directory."
        )


def _check_worker_sockets(directory: str) -> None:
    """A loader worker hands its tensors over by a socket there; where its name is too long, the batch is
    dropped with a traceback in the worker's thread, and the process that trains waits for ever."""
    longest = 107 - len("/pymp-01234567/listener-01234567")  # sun_path of Linux holds 107 bytes
    if len(os.fsencode(directory)) > longest:
        raise EnvironmentFault(
            f"{directory}: too long for the sockets of --dataloader_num_workers ({longest} bytes at most); "
            "TMPDIR=/tmp, or --dataloader_num_workers 0."
        )


def _check_course(values: dict[str, Any]) -> None:
    """The learning rate, and how it gets there."""
    rate, highest = values["learning_rate"], values["max_learning_rate"]
    if rate is not None and rate > highest:
        raise UserError(
            f"--learning_rate is {rate:g}, far above what trains ({highest:g}); "
            f"if it is meant, pass --max_learning_rate {rate:g} too."
        )
    warmup, updates = values["warmup_steps"], values["max_steps"]
    if values["lr_scheduler_type"] == "constant" and warmup:
        raise UserError(
            f"--warmup_steps {warmup:g} would do nothing with --lr_scheduler_type constant; "
            "constant_with_warmup warms up."
        )
    if updates > 0:
        require_warmup_ends(warmup, updates)


def require_warmup_ends(warmup: float, updates: int) -> None:
    """Raise UserError where the warm-up takes the whole run; before the model is loaded."""
    if warmup >= max(1, updates):
        raise UserError(
            f"--warmup_steps {warmup:g} >= {updates}, all updates of this run: the learning rate would never "
            "reach its value; a number below 1 is a share of them."
        )


def check_length(config: Any, longest: int) -> str | None:
    """What there is to say of conversations longer than the model was trained on.

    ALiBi goes on as it began; a RoPE model has never seen an angle beyond its last position.

    Raises:
        UserError: beyond the positions of a RoPE model.
    """
    is_rope = config.position_embedding == "rope"
    trained = config.max_position_embeddings if is_rope else config.model_max_length
    if longest <= trained:
        return None
    beyond = f"--model_max_length {longest} is beyond the {trained} tokens that this model was trained on"
    if is_rope:
        raise UserError(
            f"{beyond}, and RoPE does not go on from there; raise max_position_embeddings in its config.json "
            "if more are to be learnt."
        )
    return f"warning: {beyond}; ALiBi goes on from there, untrained"


# --- the machine ------------------------------------------------------------------------------------


def check_environment() -> None:
    """What a launcher sets for each process, before anything waits on it.

    Raises:
        EnvironmentFault: not a number, missing, or impossible.
    """
    way = "start through `deepspeed` or `torchrun`, which set it, or unset it"
    number = {}
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT"):
        word = os.environ.get(name)
        if word is not None and not word.isdecimal():
            raise EnvironmentFault(f"{name} in the environment is {word!r}, no whole number; {way}.")
        number[name] = None if word is None else int(word)
    if number["RANK"] is None and number["WORLD_SIZE"] in (None, 1):
        return
    missing = [name for name in (*number, "MASTER_ADDR") if name not in os.environ]
    if missing:
        there = "RANK" if "RANK" in os.environ else "WORLD_SIZE"
        raise EnvironmentFault(f"{there} is in the environment, {', '.join(missing)} not; {way}.")
    if number["RANK"] >= number["WORLD_SIZE"]:  # type: ignore[operator]
        raise EnvironmentFault(
            f"RANK {number['RANK']} is not below WORLD_SIZE {number['WORLD_SIZE']}; {way}."
        )


def check_visible_gpus(values: dict[str, Any]) -> None:
    """Raise EnvironmentFault where GPUs are asked for that are not there: it would train on the CPU."""
    present, visible = gpus_of_host(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if values["use_cpu"] or not present:  # launchers set the variable on a host without a GPU too
        return
    there = torch.cuda.device_count()
    if visible is not None and there < max(1, len(visible.split(","))):
        raise EnvironmentFault(
            f"CUDA_VISIBLE_DEVICES is {visible!r}, of which {there} are there; the host has {present} GPUs "
            "(nvidia-smi -L). Name some of them, or train on the CPU with --use_cpu True."
        )
    if there <= int(os.environ.get("LOCAL_RANK", "0")):
        raise EnvironmentFault(
            f"LOCAL_RANK is {os.environ.get('LOCAL_RANK', '0')}, and torch sees {there} of {present} GPUs; "
            "start one process per GPU, with a torch that is built for them."
        )


def gpus_of_host() -> int:
    """NVIDIA GPUs of this host, whatever CUDA_VISIBLE_DEVICES says."""
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


# --- together ---------------------------------------------------------------------------------------


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
    for name in flags.EVAL_FLAGS:
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
