"""Weights written shard by shard, and what makes the directory around them whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baichuan_sft import commit
from baichuan_sft.errors import EnvironmentFault, UserError, first_line

if TYPE_CHECKING:
    import torch

GIB = 1 << 30


class Writer:
    """Writes tensors as safetensors of a bounded size into a new directory, holding one shard in memory.

    Until the end the shards have names that nothing loads; on an error they are removed.

        with Writer(directory) as writer:
            writer.add("model.norm.weight", tensor)
        finish(directory, config, tokenizer, settings)

    Args:
        max_shard_gib: largest file; a tensor that is larger alone has a file of its own.
        expected_bytes: what will be written, for which there must be room.
    Raises:
        UserError: the directory is not empty. EnvironmentFault: no room, or the disk does not take it.
    """

    def __init__(self, directory: str | Path, *, max_shard_gib: float = 5.0, expected_bytes: int = 0):
        self.directory = Path(directory)
        self.limit = max_shard_gib * GIB
        self.total = 0
        self._buffer: dict[str, torch.Tensor] = {}
        self._names: list[list[str]] = []  # of each shard
        new_directory(self.directory, expected_bytes)

    def __enter__(self) -> Writer:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            commit.write_manifest(self.directory, {})  # until COMMIT nobody takes it for a download
        except OSError as error:
            raise self._unwritten(error) from None
        return self

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Raises EnvironmentFault: the disk does not take the shard that this fills."""
        size = tensor.numel() * tensor.element_size()
        if self._buffer and self._held + size > self.limit:
            self._flush()
        place = tensor.untyped_storage().data_ptr()
        if any(place == held.untyped_storage().data_ptr() for held in self._buffer.values()):
            tensor = tensor.clone()  # two names of one weight: safetensors writes no storage twice
        self._buffer[name] = tensor.contiguous()
        self.total += size

    @property
    def _held(self) -> int:
        return sum(t.numel() * t.element_size() for t in self._buffer.values())

    def _shard(self, number: int) -> Path:
        return self.directory / f"model-{number:05d}.safetensors"

    def _flush(self) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        self._names.append(list(self._buffer))
        try:
            save_file(self._buffer, self._shard(len(self._names)), metadata={"format": "pt"})
            # safetensors makes files that their owner alone can read
            shutil.copymode(self.directory / commit.MANIFEST, self._shard(len(self._names)))
        except (OSError, SafetensorError) as error:
            raise self._unwritten(error) from None
        self._buffer = {}

    def _unwritten(self, error: Exception) -> EnvironmentFault:
        return EnvironmentFault(f"{self.directory}: cannot be written ({first_line(error)}).")

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            try:
                self._flush()
                self._rename()
                return
            except BaseException as failed:
                shutil.rmtree(self.directory, ignore_errors=True)
                raise self._unwritten(failed) if isinstance(failed, OSError) else failed from None
        shutil.rmtree(self.directory, ignore_errors=True)

    def _rename(self) -> None:
        count = len(self._names)
        if count == 1:
            self._shard(1).rename(self.directory / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._names, 1):
            final = f"model-{number:05d}-of-{count:05d}.safetensors"
            self._shard(number).rename(self.directory / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(self.directory / "model.safetensors.index.json", index)


def new_directory(directory: Path, expected_bytes: int = 0) -> None:
    """
    Raises:
        UserError: something is there. EnvironmentFault: there is no room for so many bytes.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory}: is not an empty directory; name one that does not exist yet.")
    place = next(parent for parent in (directory, *directory.resolve().parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if expected_bytes > free:
        raise EnvironmentFault(
            f"{directory}: needs {expected_bytes / GIB:.1f} GiB, {free / GIB:.1f} GiB are free there; name "
            "another disk."
        )


def finish(
    directory: str | Path, config: Any, tokenizer: Any, settings: dict[str, Any], **facts: Any
) -> None:
    """Write everything but the weights, then the manifest over all, and COMMIT.

    A Baichuan model also gets the code that loads it where this package is not.

    Args:
        config: of the written model. tokenizer: has ``save_pretrained``.
        settings: of generation_config.json; empty: the control ids alone.
        facts: for manifest.json, where the weights come from.
    Raises:
        EnvironmentFault: the disk does not take it; the directory is removed.
    """
    directory = Path(directory)
    try:
        _complete(directory, config, tokenizer, settings)
        commit.write_manifest(directory, commit.entries_of(directory, commit.files_of(directory)), **facts)
        commit.commit(directory)
    except BaseException as error:
        shutil.rmtree(directory, ignore_errors=True)
        if isinstance(error, OSError):
            raise EnvironmentFault(f"{directory}: cannot be written ({error.strerror}).") from None
        raise


def _complete(directory: Path, config: Any, tokenizer: Any, settings: dict[str, Any]) -> None:
    if config.model_type == "baichuan":
        for file in (Path(__file__).parents[1] / "model").glob("*_baichuan.py"):
            shutil.copyfile(file, directory / file.name)
        config.architectures = ["BaichuanForCausalLM"]
        config.auto_map = {
            "AutoConfig": "configuration_baichuan.BaichuanConfig",
            "AutoModel": "modeling_baichuan.BaichuanModel",
            "AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM",
        }
    config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(directory / "generation_config.json", {**ids, **settings})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    commit.write_synced(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
