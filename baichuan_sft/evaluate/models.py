"""A model to be evaluated: any directory or cached revision, loaded, and what tells it from others."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baichuan_sft import commit
from baichuan_sft.arguments import DTYPES
from baichuan_sft.errors import UserError, first_line

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
# Of a repository; its code is not among them.
FILES = ["*.json", "*.safetensors", "*.bin", "tokenizer.model"]


@dataclass(frozen=True)
class Opened:
    """
    Attributes:
        chat: its generation settings name the roles, as those of the vendor's chat models and of all that
            was trained here do.
        facts: path, revision, variant, kind, chat, dtype, quantization, fingerprint, parameters.
    """

    model: Any
    tokenizer: Any
    chat: bool
    facts: dict[str, Any]


def open_model(
    path: str,
    *,
    dtype: str = "auto",
    device: str | None = None,
    quantize: str | None = None,
    revision: str | None = None,
) -> Opened:
    """A model, an adapter on its base, a checkpoint of either, or a revision of a repository.

    Args:
        path: a directory, or "owner/name" of a repository, which the cache may hold already.
        dtype, device, quantize: as ``--dtype``, ``--device`` and ``--quantize`` have them.
        revision: of a repository: a branch, a tag or a commit.
    Raises:
        UserError: none of these. CheckpointFault: damaged weights. EnvironmentFault: no such device.
    """
    from baichuan_sft.checkpoint import base_of, check_vocabulary, load_config, load_model, load_tokenizer
    from baichuan_sft.quantization import device as device_of
    from baichuan_sft.quantization import num_elements, quantization_of

    where = device_of(device)
    place = located(path, revision)
    config, tokenizer = load_config(base_of(place)), load_tokenizer(place)
    check_vocabulary(place, config, tokenizer)
    model = load_model(place, dtype=DTYPES.get(dtype, dtype), device=where, quantize=quantize)
    model.requires_grad_(False)  # NormHead then keeps the norms of its rows
    chat = getattr(model.generation_config, "user_token_id", None) is not None
    name, packed = str(model.dtype).removeprefix("torch."), quantization_of(model)
    facts = {
        "path": str(path),
        "revision": revision,
        "variant": variant_of(config),
        "kind": kind_of(place, chat),
        "chat": chat,
        "dtype": name,
        "quantization": packed,
        "fingerprint": fingerprint(place, name, str(packed)),
        "parameters": sum(num_elements(weight) for weight in model.parameters()),
    }
    return Opened(model, tokenizer, chat, facts)


def located(path: str, revision: str | None = None) -> Path:
    """Directory of ``path``; of a repository's revision the one in the cache, filled where it can be.

    Raises:
        UserError: a revision of a directory, or neither a directory nor a repository that can be had.
    """
    if Path(path).exists() or (revision is None and not REPOSITORY.fullmatch(str(path))):
        if revision is not None:
            raise UserError(
                f"--revisions {revision}: {path} is a directory, which has none; give the directories."
            )
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(str(path), revision=revision, allow_patterns=FILES))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(
            f"{path}{f' at {revision}' if revision else ''}: no such directory, and no repository that is in "
            f"the cache or can be fetched ({first_line(error)})."
        ) from None


def variant_of(config: Any) -> str:
    """A name in VARIANTS; with the shape behind it where that is another, as a nano model's."""
    from baichuan_sft.variants import VARIANTS, architecture

    name = architecture(config)
    if all(getattr(config, key, None) == value for key, value in VARIANTS[name].config.items()):
        return name
    return f"{name}, {config.num_hidden_layers} x {config.hidden_size}"


def kind_of(path: Path, chat: bool) -> str:
    from baichuan_sft.checkpoint.files import MERGED, is_adapter, read_json

    if (path / "trainer_state.json").is_file():
        return "checkpoint"
    if is_adapter(path):
        return "adapter"
    return "merged" if MERGED in read_json(path / "config.json") else "chat" if chat else "base"


def fingerprint(path: Path, *loaded_as: str) -> str:
    """sha256 over all that decides what a model says: weights, configuration, vocabulary, adapter and base.

    Args:
        loaded_as: dtype and quantisation, which change the weights after they are read.
    """
    from baichuan_sft.checkpoint.files import base_of, is_adapter, read_json, weight_files

    base = Path(base_of(path))
    files = [*weight_files(base), base / "config.json"]
    settings: dict[str, Any] = {}
    if is_adapter(path):
        files += weight_files(path)
        settings = read_json(path / "adapter_config.json")
        settings.pop("base_model_name_or_path", None)  # of which the weights count, not the place
    vocabulary = path / "tokenizer.model"
    files.append(vocabulary if vocabulary.is_file() else base / "tokenizer.model")
    digests = commit.side_by_side(commit.sha256_of, [str(file) for file in files])
    return hashlib.sha256(json.dumps([digests, settings, loaded_as], sort_keys=True).encode()).hexdigest()
