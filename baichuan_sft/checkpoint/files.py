"""Files of a model or adapter directory: which they are, what is in them, and whether they are as saved."""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from baichuan_sft import commit
from baichuan_sft.errors import CheckpointFault, UserError, first_line

Shapes = dict[str, tuple[int, ...]]

# In the order of transformers.
MODEL_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# What scales an adapter, in its configuration and in run.json.
ADAPTER_FACTS = {
    "r": "lora_rank",
    "lora_alpha": "lora_alpha",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}
# Of these a model's fingerprint is made, of at most so many rows each.
FINGERPRINT = ("model.embed_tokens.weight", "model.norm.weight")
FINGERPRINT_ROWS = 64
QUANT_STATE = ".weight.quant_state"
# What torch's reader raises at content that is not what it says.
UNREADABLE = (
    UnpicklingError,
    EOFError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    OSError,
    RuntimeError,
)
# In config.json: the adapter that was merged into a model.
MERGED = "merged_from"


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object.

    Raises:
        UserError: not there, not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file.") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected an object, got {type(content).__name__}.")
    return content


def is_adapter(path: str | Path) -> bool:
    return (Path(path) / "adapter_config.json").is_file()


def base_of(path: str | Path) -> str:
    """Directory of the model that an adapter was trained on, or ``path`` itself.

    Raises:
        UserError: the adapter's base is not on this machine.
    """
    if not is_adapter(path):
        return str(path)
    base = read_json(Path(path) / "adapter_config.json").get("base_model_name_or_path") or ""
    if not os.path.isdir(base):
        raise UserError(
            f"{path}: this adapter needs its base model in {base!r}, which is no directory here; "
            "set base_model_name_or_path in adapter_config.json to where it is."
        )
    return base


def weight_files(path: Path) -> list[Path]:
    """The files that transformers or PEFT read the weights from, of several kinds the one they choose.

    Raises:
        CheckpointFault: there are none.
        UserError: an index that is no JSON object.
    """
    known = ("adapter_model.safetensors", "adapter_model.bin") if is_adapter(path) else MODEL_FILES
    name = next((name for name in known if (path / name).is_file()), None)
    if name is None:
        raise CheckpointFault(f"{path}: no weights in it; expected one of {', '.join(known)}.")
    if not name.endswith(".index.json"):
        return [path / name]
    weight_map = read_json(path / name).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointFault(f"{path / name}: has no weight_map; copy this file again.")
    shards = sorted({str(shard) for shard in weight_map.values()})
    if outside := [shard for shard in shards if Path(shard).name != shard or "\\" in shard]:
        raise CheckpointFault(f"{path / name}: names {outside[0]!r}, which is no file beside it.")
    return [path / shard for shard in shards]


def shape_of(part: Any) -> tuple[int, ...]:
    """Of a tensor, or of a slice of a safetensors file that is not read yet; () of a list."""
    if isinstance(part, list):
        return ()
    return tuple(part.get_shape() if hasattr(part, "get_shape") else part.shape)


def opened(file: Path) -> dict[str, Any]:
    """Every tensor of a weight file by name, mapped and not read: ``[:10]`` reads ten rows, ``[:]`` all.

    The only place that unpickles; torch's weights_only reader builds tensors and calls nothing else.

    Raises:
        CheckpointFault: it is missing, truncated, something else, or holds anything but tensors.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        if instead := commit.masquerade(file):
            raise CheckpointFault(f"{file}: {instead}.")
        if file.suffix == ".safetensors":
            handle = safe_open(file, framework="pt")
            return {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118  (no dict)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it will refuse anyway
            # What torch wrote before 1.6 is no zip file and cannot be mapped.
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except FileNotFoundError:
        raise CheckpointFault(f"{file}: no such file, but it is part of the model; copy it there.") from None
    except (SafetensorError, *UNREADABLE) as error:
        # torch's own messages advise weights_only=False, which would run what is in the file.
        text, asked = str(error), re.search(r"GLOBAL ([\w.]+)", str(error))
        if isinstance(error, SafetensorError | OSError | RuntimeError) and "weights_only" not in text:
            raise CheckpointFault(f"{file}: not a whole file ({first_line(error)}); copy it again.") from None
        what = f" (it asks for {asked.group(1)})" if asked else ""
        raise CheckpointFault(
            f"{file}: holds more than tensors{what}, or is damaged; nothing of it was run. Get these weights "
            "as safetensors, or copy the file again."
        ) from None
    if not isinstance(tensors, dict) or not all(
        isinstance(t, (torch.Tensor, list) if str(name).endswith(QUANT_STATE) else torch.Tensor)
        for name, t in tensors.items()
    ):
        raise CheckpointFault(f"{file}: holds more than tensors by name; save the state dict alone.")
    return tensors


def file_shapes(path: Path) -> Shapes:
    """Name and shape of every tensor in the weight files of a directory; the data is not read.

    Raises:
        CheckpointFault: a file is missing, truncated, or holds anything but tensors.
    """
    return {name: shape_of(part) for file in weight_files(path) for name, part in opened(file).items()}


def check_against_manifest(path: Path) -> None:
    """Compare weights and configuration with the manifest beside them; vendors' downloads have none.

    On a host of many ranks the first one hashes, the others compare sizes. Settings that are meant to be
    edited (adapter_config.json, generation_config.json) are left out.

    Raises:
        CheckpointFault: a file is not what was saved.
    """
    if not (path / commit.MANIFEST).is_file():
        return
    names = [file.relative_to(path).as_posix() for file in weight_files(path)]
    known = ("config.json", *(name for name in MODEL_FILES if name.endswith(".index.json")))
    if not is_adapter(path):  # beside which a whole model may lie, of which nothing is read
        names += [name for name in known if (path / name).is_file()]
    names += [name for name in ("tokenizer.model",) if (path / name).is_file()]
    found = commit.problems(path, names, hashes=os.environ.get("LOCAL_RANK", "0") == "0")
    if found:
        raise CheckpointFault(
            f"{path}: {commit.summary(found)}. Copy it again; or, if you changed it yourself, delete "
            f"{commit.MANIFEST} and {commit.COMMIT} there."
        )


def fingerprint(path: str | Path) -> str | None:
    """sha256 of a model's final norm and of its first embeddings, as fp32; None where they are not found.

    Tells models of the same shapes apart, in whatever files and dtype they lie; also a merged one from its
    base, whose norm and embeddings it has.
    """
    digest, found = hashlib.sha256(), 0
    config = Path(path) / "config.json"
    if mark := read_json(config).get(MERGED) if config.is_file() else None:
        digest.update(str(mark).encode())
    for file in weight_files(Path(path)):
        tensors = opened(file)
        parts = [tensors[name][:FINGERPRINT_ROWS] for name in FINGERPRINT if name in tensors]
        for part in parts:
            digest.update(part.detach().float().contiguous().numpy().tobytes())
            found += 1
    return digest.hexdigest() if found == len(FINGERPRINT) else None


def check_base(path: Path, base: str | None = None) -> None:
    """
    Args:
        base: the model it would be put on; None: where adapter_config.json says.
    Raises:
        UserError: an adapter was trained on another model than the one it would be put on.
    """
    record = path / "run.json"
    if not (is_adapter(path) and record.is_file()):
        return
    facts = read_json(record)
    config, lora = read_json(path / "adapter_config.json"), facts.get("lora", {})
    for name, trained in ADAPTER_FACTS.items():  # the file may be edited, to say where the base lies
        if trained in lora and config.get(name) != lora[trained]:
            raise CheckpointFault(
                f"{path}/adapter_config.json: {name} is {config.get(name)}, trained was {lora[trained]}."
            )
    known, base = facts.get("base_fingerprint"), base or base_of(path)
    if known and known != fingerprint(base):
        trained = facts.get("model", {}).get("model_name_or_path")
        raise UserError(
            f"{path}: this adapter was trained on {trained} (fingerprint {known[:12]}); {base} has the same "
            "shapes and other weights. Set base_model_name_or_path in adapter_config.json to the right one."
        )
