"""A LoRA adapter as what is merged or converted: its numbers by module, and nothing it holds left out."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baichuan_sft import commit
from baichuan_sft.checkpoint import base_of, verify
from baichuan_sft.checkpoint.files import (
    MERGED,
    check_against_manifest,
    check_base,
    opened,
    read_json,
    weight_files,
)
from baichuan_sft.errors import UserError
from baichuan_sft.export.source import Source, check_finite, open_source

if TYPE_CHECKING:
    import torch

PREFIX = "base_model.model."  # PEFT's, before the names of the base
# Ways to initialise that take something out of the base's weights, which a merge would have to take out too.
TAKES_FROM_BASE = ("corda", "loftq", "lora_ga", "olora", "pissa")
# Of adapter_config.json: what is applied here, and what does not touch the result.
APPLIED = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "modules_to_save"}
APPLIED |= {"target_modules", "layers_to_transform", "layers_pattern", "exclude_modules", "init_lora_weights"}
NO_MATTER = {"base_model_name_or_path", "inference_mode", "task_type", "revision", "auto_mapping"}
NO_MATTER |= {"lora_dropout", "peft_version", "corda_config", "eva_config", "loftq_config", "lora_ga_config"}
MAX_FP32 = (2 - 2**-23) * 2.0**127


@dataclass(frozen=True)
class Lora:
    """The update of one linear: ``scaling * b @ a``.

    Attributes:
        a: ``(rank, in)``. b: ``(out, rank)``. Both fp32.
        magnitude: DoRA's length of each row of the result, fp32 ``(out,)``.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None = None


@dataclass(frozen=True)
class Adapter:
    """
    Attributes:
        config: adapter_config.json.
        run: run.json, empty where there is none.
        modules: names of the linears it changes, as in the base ("model.layers.0.self_attn.W_pack").
        saved: names of the base's tensors that it replaces (``modules_to_save``).
    """

    path: Path
    base: Source
    config: dict[str, Any]
    run: dict[str, Any]
    modules: list[str]
    saved: dict[str, str]
    _parts: Mapping[str, Any]

    def lora(self, module: str) -> Lora:
        """
        Raises:
            CheckpointFault: it holds NaN or Inf.
        """
        a, b = (self.part(f"{PREFIX}{module}.lora_{side}.weight").float() for side in "AB")
        magnitude = None
        if self.config.get("use_dora"):
            magnitude = self.part(f"{PREFIX}{module}.lora_magnitude_vector").float()
        return Lora(a, b, self.scaling(module), magnitude)

    def scaling(self, module: str) -> float:
        return scaling(self.config, *self.scale(module))

    def replacement(self, name: str) -> torch.Tensor:
        return self.part(self.saved[name])

    def part(self, name: str) -> torch.Tensor:
        tensor = self._parts[name][:]
        check_finite(f"{self.path}: {name}", tensor)
        return tensor

    def names(self) -> list[str]:
        return list(self._parts)

    def scale(self, module: str) -> tuple[int, float]:
        """Rank and lora_alpha of one linear."""
        from peft.utils.other import get_pattern_key

        patterns: dict[str, float] = self.config.get("alpha_pattern") or {}
        alpha = patterns.get(get_pattern_key(list(patterns), module), self.config["lora_alpha"])
        return self._parts[f"{PREFIX}{module}.lora_A.weight"][:].shape[0], alpha


def scaling(config: dict[str, Any], rank: int, alpha: float) -> float:
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def open_adapter(path: str | Path, base: str | None = None) -> Adapter:
    """An adapter that fits its base, every setting of which is known; little is read.

    Args:
        base: directory of the base; None: where adapter_config.json says.
    Raises:
        UserError: no adapter, another base than the one it was trained on, one it is merged into, a
            quantised one, or a kind of adapter that is not low-rank updates of linears.
        CheckpointFault: damaged files.
    """
    path = Path(path)
    config = read_json(path / "adapter_config.json")
    check_kind(path, config)
    base = base or base_of(path)
    source = open_source(base)
    check_not_merged(path, source)
    check_against_manifest(path)
    verify(path, base)
    check_base(path, base)
    parts = {name: part for file in weight_files(path) for name, part in opened(file).items()}
    inner = [name.removeprefix(PREFIX) for name in parts]
    modules = [name.removesuffix(".lora_A.weight") for name in inner if name.endswith(".lora_A.weight")]
    saved = {name: PREFIX + name for name in inner if ".lora_" not in name}
    kinds = (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector")
    if odd := [name for name in inner if name not in source.shapes and not name.endswith(kinds)]:
        raise UserError(
            f"{path}: holds {odd[0]}, no update of a linear; let PEFT's own merge_and_unload do it."
        )
    record = path / "run.json"
    run = read_json(record) if record.is_file() else {}
    return Adapter(path, source, config, run, modules, saved, parts)


def check_not_merged(path: Path, base: Source) -> None:
    """
    Raises:
        UserError: the base holds this adapter already.
    """
    mark = getattr(base.config, MERGED, None) or {}
    if mark.get("adapter_sha256") == digest(path):
        raise UserError(
            f"{base.path}: this adapter is merged into it already (base: {mark.get('base')}); use it as "
            "it is, or give the adapter its own base."
        )


def digest(path: Path) -> str:
    """sha256 of the adapter's weights."""
    joined = "".join(commit.sha256_of(file) for file in weight_files(path))
    return hashlib.sha256(joined.encode()).hexdigest()


def check_kind(path: Path, config: dict[str, Any]) -> None:
    """
    Raises:
        UserError: adapter_config.json asks for what is not done here.
    """
    from peft import LoraConfig

    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{path}: an adapter of kind {kind}; only LORA can be merged or converted.")
    plain = LoraConfig(task_type="CAUSAL_LM").to_dict()
    for name, value in config.items():
        usual = plain.get(name)
        usual = getattr(usual, "value", usual)
        if name not in APPLIED | NO_MATTER and value != usual and (value or usual):
            raise UserError(
                f"{path}/adapter_config.json: {name} is {value!r}, which is not known here; let PEFT's own "
                "merge_and_unload do it."
            )
    patterns = config.get("alpha_pattern") or {}
    alphas = [config.get("lora_alpha"), *(patterns.values() if isinstance(patterns, dict) else [patterns])]
    for alpha in alphas:
        if not (isinstance(alpha, int | float) and abs(alpha) <= MAX_FP32):
            raise UserError(f"{path}/adapter_config.json: lora_alpha is {alpha!r}; expected a finite number.")
    if not isinstance(how := config.get("init_lora_weights"), bool | str | None):
        raise UserError(
            f"{path}/adapter_config.json: init_lora_weights is {how!r}; expected true, false or a name."
        )
    start = str(config.get("init_lora_weights", "")).lower()
    if start.startswith(TAKES_FROM_BASE):
        raise UserError(
            f"{path}: init_lora_weights {start!r} took its start out of the base's weights, so it is no "
            "update of them; save it with PEFT's path_initial_model_for_weight_conversion, then take that."
        )
