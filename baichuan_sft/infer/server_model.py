"""The base model and its adapters, each under a name that clients ask for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from baichuan_sft.checkpoint import base_of, is_adapter, verify
from baichuan_sft.checkpoint.files import check_against_manifest, check_base, read_json
from baichuan_sft.errors import UserError
from baichuan_sft.infer.chat import load
from baichuan_sft.infer.server_engine import Engine


def adapter_directories(args: Any) -> tuple[str, str, dict[str, str]]:
    """Directory and served name of the base, and name to directory of each adapter.

    Raises:
        UserError: a name twice or not a name, or an adapter of another base.
    """
    own = args.name or Path(args.path).resolve().name
    base = base_of(args.path)
    found: dict[str, str] = {}
    if is_adapter(args.path):
        found[own], own = args.path, Path(base).resolve().name
        if own in found:
            raise UserError(f"adapter and base are both named {own}; pass --name for the adapter.")
    for word in args.adapter:
        name, equals, directory = word.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
            raise UserError(
                f"--adapter {word}: expected NAME=DIR, the name of letters, digits, '.', '_', '-'."
            )
        if name in found or name == own:
            raise UserError(f"--adapter {word}: the name {name} is already taken.")
        if not is_adapter(directory):
            raise UserError(f"--adapter {word}: no adapter_config.json in that directory.")
        found[name] = directory
    for name, directory in found.items():
        if Path(base_of(directory)).resolve() != Path(base).resolve():
            raise UserError(f"adapter {name} ({directory}) belongs on {base_of(directory)}, not on {base}.")
    return base, own, found


def load_engine(args: Any) -> Engine:
    """The model with all its adapters on it, in an engine that is not started.

    Raises:
        UserError, EnvironmentFault, CheckpointFault: of ``load`` and of ``adapter_directories``.
    """
    base, own, directories = adapter_directories(args)
    args.path = base
    model, tokenizer = load(args)
    names: dict[str, str | None] = {own: None}
    settings = {own: model.generation_config}
    for i, (name, directory) in enumerate(directories.items()):
        names[name] = inner = f"adapter{i}"  # PEFT makes module names of them, which have no dots
        model, settings[name] = put_adapter(model, directory, inner, settings[own])
    model.requires_grad_(False)
    return Engine(
        model.eval(), tokenizer, names, settings, max_batch=args.max_batch, max_queue=args.max_queue
    )


def put_adapter(model: Any, directory: str, name: str, settings: Any) -> tuple[Any, Any]:
    """``model`` with one adapter more, and the generation settings beside the adapter, or ``settings``.

    Raises:
        CheckpointFault: the files are not as they were saved. UserError: it was trained on another model, or
            it is a prompt, not weights.
    """
    from peft import PeftConfig, PeftModel
    from transformers import GenerationConfig

    path = Path(directory)
    check_against_manifest(path)
    check_base(path)
    verify(path)
    config = PeftConfig.from_pretrained(directory)
    if config.is_prompt_learning:  # added in PEFT's own forward, which the engine does not call
        kind = config.peft_type.value
        raise UserError(f"{directory}: a {kind} adapter adds a prompt; serve takes what changes weights.")
    own = path / "generation_config.json"
    if own.is_file():
        settings = GenerationConfig.from_dict(read_json(own))
    if isinstance(model, PeftModel):
        model.load_adapter(directory, adapter_name=name)
    else:
        model = PeftModel.from_pretrained(model, directory, adapter_name=name)
    return model, settings
