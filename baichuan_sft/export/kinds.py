"""What a directory is, by its own marks: its facts, what it lacks, and the command that uses it."""

from __future__ import annotations

import math
import shlex
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baichuan_sft import checkpoint, commit
from baichuan_sft.checkpoint.files import (
    MERGED,
    MODEL_FILES,
    base_of,
    check_against_manifest,
    check_base,
    is_adapter,
    read_json,
    weight_files,
)
from baichuan_sft.errors import UserError
from baichuan_sft.export.modernise import clean_config
from baichuan_sft.export.source import VOCABULARIES, open_source
from baichuan_sft.quantization import stored_quantization
from baichuan_sft.variants import VARIANTS

if TYPE_CHECKING:
    from baichuan_sft.model.configuration_baichuan import BaichuanConfig

CLI = "baichuan-sft"
PLACES = ("FILE", "DIR")  # for the user to fill in


@dataclass
class Finding:
    """What a path is.

    Attributes:
        facts: name -> value, as it is shown.
        lacks: what keeps it from being used, a line each; empty where nothing does.
        use: commands.
    """

    path: str
    kind: str = "nothing"
    facts: dict[str, Any] = field(default_factory=dict)
    lacks: list[str] = field(default_factory=list)
    use: list[str] = field(default_factory=list)

    def attempt(self, function: Callable[..., Any], *args: Any) -> Any:
        """What it returns; what it refuses is lacking."""
        try:
            return function(*args)
        except UserError as error:
            self.lacks.append(str(error))
            return None

    def command(self, *words: Any) -> None:
        self.use.append(
            " ".join([CLI, *(word if word in PLACES else shlex.quote(word) for word in map(str, words))])
        )


def inspect(path: str | Path) -> Finding:
    """What a path is; only what says so itself is believed, and nothing in it is run.

    Raises:
        UserError: there is no such path.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or directory.")
    found = Finding(str(path))
    for look in LOOKS:
        if look(path, found):
            return found
    found.lacks.append("a config.json, adapter_config.json, *.gguf, checkpoint-N or prepared data")
    return found


def gguf(path: Path, found: Finding) -> bool:
    files = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    for file in files:
        head = file.open("rb").read(24)
        if not head.startswith(b"GGUF"):
            if file.suffix != ".gguf":
                return False
            found.kind = "gguf"
            found.lacks.append(
                f"{file.name}: {commit.masquerade(file) or 'does not begin as a GGUF file does'}"
            )
            return True
        if len(head) < 24:
            found.lacks.append(f"{file.name}: ends after {len(head)} bytes; copy it again")
            continue
        version, tensors, keys = struct.unpack("<IQQ", head[4:])
        size = file.stat().st_size
        found.facts[file.name] = f"{size:,} bytes, GGUF {version}, {tensors} tensors, {keys} settings"
        found.use.append(f"llama-cli --model {shlex.quote(str(file))} --conversation")
    if files and (path / "Modelfile").is_file():
        found.use.append(f"cd {shlex.quote(str(path))} && ollama create NAME --file Modelfile")
    found.kind = "gguf" if files else found.kind
    return bool(files)


def adapter(path: Path, found: Finding) -> bool:
    """LoRA weights, of a result or of a checkpoint: does its base lie here, and fit?"""
    if not is_adapter(path):
        return False
    found.kind = "adapter"
    settings = found.attempt(read_json, path / "adapter_config.json") or {}
    found.facts |= {
        "base": settings.get("base_model_name_or_path"),
        "rank": settings.get("r"),
        "alpha": settings.get("lora_alpha"),
        "on": settings.get("target_modules"),
    }
    _manifest(path, found)
    base = found.attempt(base_of, path)
    config = found.attempt(checkpoint.load_config, base) if base else None
    if config:
        _model_facts(config, found)
        found.attempt(checkpoint.verify, path)
        found.attempt(checkpoint.verify, base)
        found.attempt(checkpoint.load_tokenizer, path)
        found.attempt(check_base, path)
        found.facts["fits its base"] = not found.lacks
    _training(path, found)
    if not found.lacks:
        found.command("chat", path)
        if stored_quantization(config) is None:
            found.command("merge", path, "DIR")
    return True


def model(path: Path, found: Finding) -> bool:
    """Whole weights: a vendor's, a result, a checkpoint's, merged, converted or quantised."""
    if not (path / "config.json").is_file():
        return False
    raw = found.attempt(read_json, path / "config.json")
    if raw is None:
        return True
    if raw.get("model_type") != "baichuan":
        found.kind = f"model of type {raw.get('model_type')!r}"
        found.facts |= {"architecture": str(raw.get("architectures")), "vocabulary": raw.get("vocab_size")}
        facts = _manifest(path, found)
        if facts.get("converted_to") == "llama":
            found.kind = "Baichuan model in Llama's layout"
            found.use += [] if found.lacks else [f"vllm serve {shlex.quote(str(path))}"]
        else:
            found.lacks.append("this program uses models of type 'baichuan'")
        return True
    facts = _manifest(path, found)
    quantised = raw.get("quantization_config")
    if quantised:
        by = quantised.get("quant_method") if isinstance(quantised, dict) else None
        found.kind = f"model quantised by {by}" if by else "model quantised by the vendor's own code"
        config = found.attempt(checkpoint.load_config, path)
        if config:
            found.facts["quantised"] = stored_quantization(config)
            found.attempt(checkpoint.verify, path)
            found.attempt(checkpoint.load_tokenizer, path)
    else:
        found.kind = next((text for name, text in ORIGINS.items() if name in {**raw, **facts}), "model")
        source = found.attempt(lambda: open_source(path, check=False))
        config = source.config if source else None
        if source:
            found.facts |= {"notes": source.notes} if source.notes else {}
            found.facts["tensors"] = len(source.names())
            found.facts["weights"] = f"{source.num_bytes():,} bytes in {len(weight_files(path))} files"
    if config:
        _model_facts(config, found)
    if (path / "tokenizer.model").is_file():
        digest = commit.sha256_of(path / "tokenizer.model")
        found.facts["tokenizer"] = VOCABULARIES.get(digest, f"unknown (sha256 {digest[:12]})")
    _training(path, found)
    if not found.lacks:
        found.command("chat", path)
    if not found.lacks and not quantised:
        found.command("train", "--model_name_or_path", path, "--data_path", "FILE", "--output_dir", "DIR")
        found.command("convert", path, "DIR")
    return True


def zero(path: Path, found: Finding) -> bool:
    """DeepSpeed's shards alone, without weights that anything loads."""
    shards = [file for pattern in ("*_states.pt", "*/*_states.pt") for file in path.glob(pattern)]
    if not shards or any((path / name).is_file() for name in MODEL_FILES):
        return False
    found.kind = "raw ZeRO shards"
    found.facts |= {"shards": len(shards), "bytes": f"{sum(file.stat().st_size for file in shards):,}"}
    found.lacks.append("weights that anything loads: these are pickles of DeepSpeed's, a part for each rank")
    found.use.append(f"python zero_to_fp32.py {shlex.quote(str(path))} DIR  # DeepSpeed's; it unpickles")
    _training(path, found)
    return True


def run(path: Path, found: Finding) -> bool:
    """A run that wrote checkpoints and no result yet."""
    checkpoints = commit.checkpoints(path) if path.is_dir() else []
    if not checkpoints:
        return False
    found.kind = "training run without a result"
    newest, broken = commit.newest_valid(path)
    found.facts |= {
        "checkpoints": [item.name for item in checkpoints],
        "newest whole": newest and newest.name,
    }
    found.lacks += broken
    if newest:
        found.command("inspect", newest)
        found.command("chat", newest)
    return True


def data(path: Path, found: Finding) -> bool:
    files = sorted(path.glob("data-*.arrow")) if path.is_dir() else []
    if not files or not (path / "survey.json").is_file():
        return False
    found.kind = "tokenised data"
    found.facts |= {"files": len(files), "bytes": f"{sum(file.stat().st_size for file in files):,}"}
    found.use.append(
        "a part of --cache_dir: `baichuan-sft train` with the same data and tokenizer finds it there"
    )
    return True


# In this order: a checkpoint has more than one of these marks.
LOOKS: list[Callable[[Path, Finding], bool]] = [adapter, zero, model, gguf, run, data]
# A fact of manifest.json or config.json -> what a model is.
ORIGINS = {
    MERGED: "model with an adapter merged in",
    "converted_to": "converted model",
    "step": "trained model",
}


def _manifest(path: Path, found: Finding) -> dict[str, Any]:
    """The facts of manifest.json, empty without one; what it finds broken is lacking."""
    if not (path / commit.MANIFEST).is_file():
        found.facts["manifest"] = "none (a download has none)"
        return {}
    before = len(found.lacks)
    found.attempt(check_against_manifest, path)
    found.facts["manifest"] = "whole" if len(found.lacks) == before else "broken"
    try:
        return {
            name: value
            for name, value in commit.read_manifest(path).items()
            if name not in ("format", "files")
        }
    except (ValueError, OSError):
        return {}


def _model_facts(config: BaichuanConfig, found: Finding) -> None:
    shape = {
        name: getattr(config, name)
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    }
    kind = next(
        name
        for name in VARIANTS
        if ("7b" in name) == (config.position_embedding == "rope")
        and (name.startswith("baichuan2")) == (config.lm_head == "norm")
    )
    full = all(VARIANTS[kind].config[name] == value for name, value in shape.items())
    shapes = checkpoint.expected_shapes(clean_config(config)).values()  # as they are, not as packed
    found.facts |= {
        "variant": kind
        if full
        else f"{kind}'s architecture, {config.num_hidden_layers} x {config.hidden_size}",
        "parameters": f"{sum(map(math.prod, shapes)):,}",
        "dtype": str(config.dtype or "not said").removeprefix("torch."),
        "vocabulary": config.vocab_size,
        "context": config.context_length,
    }


def _training(path: Path, found: Finding) -> None:
    """Where it lies in a run, and how that goes on."""
    if not (path / "trainer_state.json").is_file():
        return
    found.kind = f"training checkpoint ({found.kind})"
    record = found.attempt(read_json, path / "run.json") if (path / "run.json").is_file() else {}
    found.facts["step"] = commit.step_of(path)
    found.facts["processes"] = (record or {}).get("world_size")
    command = (record or {}).get("command")
    if isinstance(command, list):
        found.command("train", *_flags(command[1:]), "--resume", path)


def _flags(words: list[Any]) -> list[str]:
    """Of a run's command: without what says where it began, and which rank it was."""
    said, flags = [str(word) for word in words], []
    said = said[said[:1] == ["train"] :]
    for before, word in zip(["", *said], said):
        name = word.partition("=")[0] if word.startswith("--") else before
        if name not in ("--local_rank", "--resume", "--resume_from_checkpoint", "--overwrite_output_dir"):
            flags.append(word)
    return flags
