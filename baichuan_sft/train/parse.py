"""Flags and config files of `train` to Settings: each is honoured, mapped with a notice, or refused."""

from __future__ import annotations

import argparse
import dataclasses
import glob
import os
import tempfile
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from baichuan_sft.data.sources import split_share
from baichuan_sft.errors import EnvironmentFault, UserError
from baichuan_sft.train import args as tables
from baichuan_sft.train import flags
from baichuan_sft.train.args import Settings
from baichuan_sft.train.benchmarks import check_tasks
from baichuan_sft.train.best import check_best
from baichuan_sft.train.checks import (
    check_bitsandbytes,
    check_data,
    check_environment,
    check_values,
    check_visible_gpus,
    is_flat,
    require_no_model_lost,
)
from baichuan_sft.train.config_file import ROOT, close_flag, find_file, located, read_config
from baichuan_sft.train.fused import check_fused, require_fused
from baichuan_sft.train.resume import check_resume
from baichuan_sft.train.zero import agree, find_recipe, zero_stage
from baichuan_sft.train.zero_check import check_config


class _Parser(HfArgumentParser):
    def error(self, message: str):  # type: ignore[override]
        raise UserError(f"{message}. See --help.")


class _Help(argparse.RawDescriptionHelpFormatter):
    """Adds the default where the help says nothing of it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        silent = action.default in (None, argparse.SUPPRESS, "") or "default" in text or action.required
        return text if silent else f"{text} Default %(default)s."


EXAMPLE = """example:
  deepspeed --num_gpus 8 fine-tune/fine-tune.py --model_name_or_path Baichuan2-7B-Base \\
      --data_path data/belle_chat.json --output_dir out --deepspeed ds_config.json --bf16 True --use_lora True

--config FILE reads the same names from YAML or JSON; flags win over it. A switch is True or False (or yes,
no, y, n, t, f, 1, 0); without a value it is True. --help_all lists every flag."""


def build_parser(show_all: bool = False) -> argparse.ArgumentParser:
    """All flags; the help names the common ones unless ``show_all``."""
    sections: Any = tables.SECTIONS
    parser = _Parser(
        sections,
        prog="baichuan-sft train",
        usage="%(prog)s --model_name_or_path DIR --data_path FILE --output_dir DIR [flags]",
        description="Fine-tune a Baichuan model on conversations, all weights or LoRA.",
        epilog=EXAMPLE,
        formatter_class=_Help,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file with these flags as keys.")
    parser.add_argument("--help_all", action="help", help="Show every flag and exit.")
    ours = {f.name for section in tables.SECTIONS[:3] for f in dataclasses.fields(section)}
    ours |= {"config", "help", "help_all"}
    for action in parser._actions:
        # transformers adds each flag with hyphens too; `_modernise` reads those, the help need not.
        action.option_strings = [word for word in action.option_strings if "-" not in word[2:]]
        action.type = switch if action.type is string_to_bool else action.type
        action.help = flags.HELP.get(action.dest, action.help)
        if not show_all and action.dest not in ours and action.dest not in flags.COMMON:
            action.help = argparse.SUPPRESS
    return parser


def switch(word: str) -> bool:
    """An argparse ``type``."""
    try:
        return string_to_bool(word)
    except argparse.ArgumentTypeError:
        way = "is neither True nor False (nor yes, no, y, n, t, f, 1, 0)"
        raise argparse.ArgumentTypeError(f"{word!r} {way}") from None


def parse(argv: list[str]) -> Settings:
    """Flags, and a config file under them, to Settings.

    Raises:
        UserError: unknown or repeated flag, wrong type, value out of its range, missing file.
        EnvironmentFault: a precision that this machine does not have.
    """
    notices: list[str] = []
    check_environment()
    parser = build_parser(show_all="--help_all" in argv)
    known = {option for action in parser._actions for option in action.option_strings}
    argv = _modernise(argv, notices)
    _refuse_unknown_or_repeated(argv, known)
    config = dict(zip(argv, argv[1:])).get("--config")
    places: dict[str, str] = {}
    if config is not None:
        lines, places = read_config(config, known)
        lines = _modernise(lines, notices)
        _refuse_unknown_or_repeated(lines, known)
        given = {word for word in argv if word.startswith("--")}
        places = {flag: place for flag, place in places.items() if flag not in given}
        argv = [word for pair in zip(lines[::2], lines[1::2]) if pair[0] not in given for word in pair] + argv
    try:
        values = vars(parser.parse_args(argv))
        if values["deepspeed"]:
            values["deepspeed"] = find_recipe(values["deepspeed"])
            check_config(values["deepspeed"])
            agree(values, {word[2:] for word in argv if word.startswith("--")}, places, notices)
        flat = _settle(values, parser, notices)
    except UserError as error:
        located(error, places)
    sections = [{f.name: values[f.name] for f in dataclasses.fields(s) if f.init} for s in tables.SECTIONS]
    return Settings(
        tables.ModelArguments(**sections[0]),
        tables.DataArguments(**sections[1]),
        tables.LoraArguments(**sections[2]),
        sections[3],
        notices,
        flat,
    )


def _settle(values: dict[str, Any], parser: argparse.ArgumentParser, notices: list[str]) -> bool:
    """Refuse what cannot be, fill in what follows; whether a packed micro-batch is one row."""
    check_values(values, parser)
    flat = is_flat(values)
    check_data(values, parser)
    check_best(values)
    check_tasks(values, parser)
    _resolve_paths(values)
    check_bitsandbytes(values, parser)
    check_fused(values, zero_stage(values["deepspeed"]))
    if values["torch_compile"] and values["checkpointing"] == "selective":
        raise UserError(
            "--checkpointing selective is not possible with --torch_compile True: a compiled block is "
            "computed again as a whole; use none, full or auto."
        )
    _fit_to_machine(values, notices)
    _fill_defaults(values, notices)
    return flat


def _modernise(argv: list[str], notices: list[str]) -> list[str]:
    """Older flags under today's names; ``--x=y`` as two words."""
    words: list[str] = []
    for word in argv:
        name, equals, value = word.partition("=")
        words += [name, value] if word.startswith("--") and equals else [word]
    result: list[str] = []
    switched: list[tuple[str, str]] = []
    i = 0
    while i < len(words):
        name = words[i].removeprefix("--").replace("-", "_") if words[i].startswith("--") else ""
        has_value = i + 1 < len(words) and not words[i + 1].startswith("--")
        if name in flags.GONE:
            notices.append(f"--{name} has no effect any more: {flags.GONE[name]}")
            i += 2 if has_value else 1
        elif name in flags.RENAMED:
            notices.append(f"--{name} is called --{flags.RENAMED[name]} today")
            result.append(f"--{flags.RENAMED[name]}")
            i += 1
        elif name in flags.SWITCHES:
            today, on, off = flags.SWITCHES[name]
            value = on if _is_true(name, words[i + 1] if has_value else "true") else off
            notices.append(f"--{name} is called --{today} {value} today")
            switched.append((f"--{today}", value))
            i += 2 if has_value else 1
        else:
            result.append(f"--{name}" if name else words[i])
            i += 1
    said = set(zip(result, result[1:]))
    return result + [word for pair in dict.fromkeys(switched) if pair not in said for word in pair]


def _is_true(name: str, word: str) -> bool:
    try:
        return switch(word)
    except argparse.ArgumentTypeError as error:
        raise UserError(f"--{name}: {error}.") from None


def _refuse_unknown_or_repeated(argv: list[str], known: set[str]) -> None:
    seen: dict[str, str] = {}
    for i, word in enumerate(argv):
        if not word.startswith("--"):
            continue
        if word not in known:
            raise UserError(f"unknown flag {word}{close_flag(word[2:], known)} see --help.")
        value = argv[i + 1] if i + 1 < len(argv) else ""
        if word in seen and word != "--local_rank":
            raise UserError(f"{word} is given twice, with {seen[word]!r} and {value!r}; keep one.")
        seen[word] = value


def _find_source(flag: str, word: str) -> str:
    """``FILE[:WEIGHT][#COUNT]`` with the file as ``find_file`` finds it; patterns too."""
    if os.path.exists(word):
        return find_file(flag, word)
    path, share = split_share(word)
    for folder in (Path(), ROOT):
        if glob.has_magic(path) and glob.glob(str(folder / path), recursive=True):
            return f"{(folder / path).absolute()}{share}"
    return f"{find_file(flag, path)}{share}"


def _resolve_paths(values: dict[str, Any]) -> None:
    for flag in ("data_path", "eval_data_path"):
        if values[flag] is not None:
            words = [word.strip() for word in values[flag].split(",")]
            values[flag] = ",".join(_find_source(flag, word) for word in words)
    model = values["model_name_or_path"]
    if not os.path.isdir(model) and not (ROOT / model).is_dir():
        raise UserError(
            f"--model_name_or_path {model}: no such directory. Weights are read from a local directory; "
            "download the model first, code in it is never run."
        )
    values["model_name_or_path"] = find_file("model_name_or_path", model)
    out = values["output_dir"]
    try:
        require_no_model_lost(values["model_name_or_path"], out)
        os.makedirs(out, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except FileExistsError:
        raise UserError(f"--output_dir {out} is a file; name a directory.") from None
    except OSError as error:
        raise UserError(f"--output_dir {out}: nothing can be written there: {error.strerror}.") from None


def _fit_to_machine(values: dict[str, Any], notices: list[str]) -> None:
    """What this machine cannot honour is left out with a notice where that is safe, else refused."""
    import torch

    on_gpu = torch.cuda.is_available() and not values["use_cpu"]
    device_index = int(os.environ.get("LOCAL_RANK", "0"))
    check_visible_gpus(values)
    capability = torch.cuda.get_device_capability(device_index) if on_gpu else (0, 0)
    device = f"{torch.cuda.get_device_name()} ({capability[0]}.{capability[1]})" if on_gpu else "the CPU"
    if values["tf32"] and capability < (8, 0):
        notices.append(f"--tf32 True is left out: {device} has no TF32, it came with compute capability 8.0")
        values["tf32"] = None
    if values["bf16"] is None:
        values["bf16"] = capability >= (8, 0) and not values["fp16"]
        if values["bf16"]:
            notices.append(f"bf16 True: the default on {device}; --bf16 False trains in fp32")
        elif on_gpu and not values["fp16"]:
            notices.append(f"fp32: {device} has no bfloat16; --fp16 True takes half the memory")
    if values["bf16"] and on_gpu and capability < (8, 0):
        raise EnvironmentFault(
            f"--bf16 True: {device} has no bfloat16; use --fp16 True, or neither for fp32."
        )
    if values["fp16"] and not on_gpu:
        raise EnvironmentFault(
            "--fp16 True: the CPU trains in bfloat16 or fp32 only; use --bf16 True, or neither."
        )
    values["use_cpu"] = not on_gpu
    require_fused(values)


def _fill_defaults(values: dict[str, Any], notices: list[str]) -> None:
    kind = "lora" if values["use_lora"] else "full"
    if values["learning_rate"] is None:
        values["learning_rate"] = tables.LEARNING_RATES[kind]
        notices.append(f"learning_rate {values['learning_rate']:g}: the default of {kind} training")
    for option in dataclasses.fields(tables.LoraArguments):
        if not values["use_lora"] and values[option.name] != option.default:
            raise UserError(f"--{option.name} is given without --use_lora True, and would do nothing.")
    for name, value in zip(
        ("lora_rank", "lora_alpha", "lora_dropout"), tables.LORA_PRESETS[values["lora_preset"]]
    ):
        values[name] = value if values[name] is None else values[name]
    if values["max_grad_norm"] == 0:
        notices.append("max_grad_norm 0: gradients are not clipped")
    check_resume(values)
