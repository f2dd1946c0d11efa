"""What is wrong with a DeepSpeed file, one line per key; DeepSpeed itself says which keys there are."""

from __future__ import annotations

import inspect
import json
import logging
import os
from collections.abc import Iterator
from typing import Any

from baichuan_sft.errors import UserError, first_line, suggest
from baichuan_sft.train.zero import AUTO, TWINS, deepspeed_config, schedules, value_at

BATCH = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps")
NAMES = {bool: "true or false", int: "a whole number", str: "a text", (int, float): "a number"}


class _Asked(dict):
    """A dictionary that keeps the names it was asked for: all that DeepSpeed would read."""

    def __init__(self, values: dict[str, Any]):
        super().__init__(values)
        self.names: set[str] = set()

    def __contains__(self, name):
        self.names.add(name)
        return super().__contains__(name)

    def __getitem__(self, name):
        self.names.add(name)
        return super().__getitem__(name)

    def get(self, name, default=None):
        self.names.add(name)
        return super().get(name, default)

    def keys(self):  # type: ignore[override]
        return self


def check_config(path: str) -> None:
    """What DeepSpeed would ignore, or refuse hours later in its own words.

    Raises:
        UserError: one line per key.
    """
    config = deepspeed_config(path)
    faults = [*_key_faults(config), *_value_faults(config)]
    if not faults:
        _, error = _as_deepspeed(config)
        faults = [first_line(error)] if error else []
    if faults:
        many = f"{len(faults)} keys are wrong:\n  " if len(faults) > 1 else ""
        raise UserError(f"{path}: {many}" + "\n  ".join(faults))


def _as_deepspeed(config: dict[str, Any]) -> tuple[set[str], Exception | None]:
    """The keys that DeepSpeed looks for, and what it says of the values."""
    from deepspeed.runtime.config import DeepSpeedConfig

    # `agree` looks at the batch, of which DeepSpeed needs one of three numbers here
    others = {name: value for name, value in _without_auto(config).items() if name not in BATCH}
    asked = _Asked(others | {BATCH[0]: 1})
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it says the same again when the run begins
    try:
        DeepSpeedConfig(asked)
    except Exception as error:  # whatever it raises is about this file: nothing else has begun
        return asked.names, error
    finally:
        logging.disable(level)
    return asked.names, None


def _without_auto(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_auto(inner) for name, inner in value.items() if inner != "auto"}
    return value


def _key_faults(config: dict[str, Any]) -> Iterator[str]:
    """Keys that DeepSpeed would ignore: no model of it has them, and it never looks for them."""
    known = _as_deepspeed({})[0] - {"bfloat16"}  # an older name of bf16, which transformers does not read
    for name in sorted(config.keys() - known):
        yield f"unknown key {name}, which DeepSpeed would ignore{suggest(name, sorted(known))}"
    for section in ("optimizer", "scheduler"):
        if not isinstance(given := config.get(section, {}), dict):
            yield f"{section} is {json.dumps(given)}; it must be an object"
        elif given:
            if not isinstance(given.get("type"), str) or not isinstance(given.get("params", {}), dict):
                yield f'{section} needs a "type" and, if any, an object of "params"'
            for name in sorted(given.keys() - {"type", "params", "legacy_fusion"}):
                yield f"unknown key {section}.{name}{suggest(name, ['type', 'params'])}"
    scheduler = config.get("scheduler")
    if isinstance(scheduler, dict) and isinstance(scheduler.get("type"), str):
        if scheduler["type"] not in schedules():
            close = suggest(scheduler["type"], list(schedules()))
            yield f"scheduler.type is {json.dumps(scheduler['type'])}, which DeepSpeed does not have{close}"
        else:
            takes = inspect.signature(schedules()[scheduler["type"]]).parameters
            for name in sorted(scheduler.get("params", {}).keys() - takes.keys()):
                yield f"unknown key scheduler.params.{name}{suggest(name, list(takes))}"


def _value_faults(config: dict[str, Any]) -> Iterator[str]:
    from pydantic import ValidationError

    zero = config.get("zero_optimization", {})
    if not isinstance(zero, dict):
        yield f"zero_optimization is {json.dumps(zero)}; it must be an object"
        return
    stage = zero.get("stage", 0)
    if type(stage) is not int or not 0 <= stage <= 3:
        yield f"zero_optimization.stage is {json.dumps(stage)}; it must be a number from 0 to 3"
    for part in ("offload_param", "offload_optimizer"):
        offload = zero.get(part)
        if isinstance(offload, dict) and offload.get("device") == "nvme":
            folder = offload.get("nvme_path")
            if not isinstance(folder, str) or not os.path.isdir(folder):
                yield f"zero_optimization.{part}.nvme_path is {json.dumps(folder)}; no such directory"
    enabled = [name for name in ("fp16", "bf16") if value_at(config, f"{name}.enabled") is True]
    if len(enabled) == 2:
        yield "fp16.enabled and bf16.enabled are both true; keep one"
    for key, value in _leaves(config):
        if value == "auto" and key not in AUTO:
            yield f'{key} is "auto", which nothing fills in; write a value, or leave it out'
    for section, values in config.items():
        error = _as_deepspeed({section: values})[1] if isinstance(values, dict) else None
        if isinstance(error, ValidationError):
            fields = {name for model in _models() for name in model.model_fields}
            for fault in error.errors():
                key = ".".join([section, *map(str, fault["loc"])])
                if fault["type"] == "extra_forbidden":
                    yield f"unknown key {key}{suggest(str(fault['loc'][-1]), sorted(fields))}"
                elif key != "zero_optimization.stage":
                    rule = fault["msg"][0].lower() + fault["msg"][1:]
                    yield f"{key} is {json.dumps(fault['input'])}: {rule}"
    for key, (_, kind) in TWINS.items():
        value = value_at(config, key)
        fits = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
        if value not in (None, "auto") and not fits:
            yield f"{key} is {json.dumps(value)}; it must be {NAMES[kind]}"


def _models() -> list[Any]:
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    return DeepSpeedConfigModel.__subclasses__()


def _leaves(config: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        yield from _leaves(value, f"{before}{name}.") if isinstance(value, dict) else [(before + name, value)]
