"""The one door for models and tokenizers on disk: load them, and verify that they are whole."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baichuan_sft.errors import CheckpointFault, UserError

if TYPE_CHECKING:
    import torch

    from baichuan_sft.model.configuration_baichuan import BaichuanConfig
    from baichuan_sft.model.tokenization_baichuan import BaichuanTokenizer

Shapes = dict[str, tuple[int, ...]]


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object.

    Raises:
        UserError: not there, not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
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
        raise UserError(f"{path}: this adapter needs its base model in {base!r}, which is no directory here; "
                        "set base_model_name_or_path in adapter_config.json to where it is.")
    return base


def load_config(path: str | Path) -> BaichuanConfig:
    """Configuration of a model directory.

    Raises:
        UserError: no directory, no config.json, or not a Baichuan model.
    """
    from baichuan_sft.model.configuration_baichuan import BaichuanConfig

    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such directory.")
    raw = read_json(path / "config.json")
    if raw.get("model_type") != "baichuan":
        raise UserError(f"{path}: not a Baichuan model: config.json has model_type {raw.get('model_type')!r}, "
                        "expected 'baichuan'.")
    try:
        return BaichuanConfig.from_pretrained(path)
    except ValueError as error:
        raise UserError(f"{path / 'config.json'}: {error}.") from None


def load_tokenizer(path: str | Path) -> BaichuanTokenizer:
    """Tokenizer of a model directory, of an adapter's, or of a bare ``tokenizer.model``.

    Raises:
        UserError: no such file, or no SentencePiece model in the directory.
    """
    from baichuan_sft.model.tokenization_baichuan import BaichuanTokenizer

    path = Path(path)
    if path.is_file():
        return BaichuanTokenizer(vocab_file=str(path))
    if is_adapter(path) and not (path / "tokenizer.model").is_file():
        path = Path(base_of(path))
    if not (path / "tokenizer.model").is_file():
        raise UserError(f"{path}: no tokenizer.model in it; copy the one of the base model there.")
    return BaichuanTokenizer.from_pretrained(path)


def expected_shapes(config: BaichuanConfig) -> Shapes:
    """Name and shape of every tensor that a model of this configuration has."""
    import torch

    from baichuan_sft.model.modeling_baichuan import BaichuanForCausalLM

    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in BaichuanForCausalLM(config).state_dict().items()}


def file_shapes(path: Path) -> Shapes:
    """Name and shape of every tensor in the safetensors files of a directory, from their headers.

    Raises:
        CheckpointFault: a file is missing, truncated, or not safetensors.
    """
    from safetensors import SafetensorError, safe_open

    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(read_json(index)["weight_map"].values()))
    else:
        names = ["adapter_model.safetensors" if is_adapter(path) else "model.safetensors"]
    shapes: Shapes = {}
    for name in names:
        try:
            with safe_open(path / name, framework="pt") as file:
                shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise CheckpointFault(f"{path / name}: no such file.") from None
        except (SafetensorError, OSError) as error:
            raise CheckpointFault(f"{path / name}: not a whole safetensors file: {error}.") from None
    return shapes


def compare_shapes(path: str | Path, found: Shapes, expected: Shapes) -> None:
    """
    Raises:
        CheckpointFault: a tensor is missing, too many, or of another shape; names the first of each kind.
    """
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    odd = sorted(name for name in expected.keys() & found.keys() if expected[name] != found[name])
    faults = []
    if missing:
        faults.append(f"{len(missing)} tensors missing, e.g. {missing[0]}")
    if extra:
        faults.append(f"{len(extra)} tensors that do not belong, e.g. {extra[0]}")
    if odd:
        faults.append(f"{len(odd)} tensors of another shape, e.g. {odd[0]} {found[odd[0]]}, expected {expected[odd[0]]}")
    if faults:
        raise CheckpointFault(f"{path}: does not fit its configuration: {'; '.join(faults)}.")


def expected_adapter_shapes(adapter: dict[str, Any], base: Shapes) -> Shapes:
    """Tensors of a LoRA adapter with this adapter_config on a base with these tensors."""
    rank, shapes = adapter["r"], {}
    for name, shape in base.items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] not in adapter["target_modules"]:
            continue
        shapes[f"base_model.model.{module}.lora_A.weight"] = (rank, shape[1])
        shapes[f"base_model.model.{module}.lora_B.weight"] = (shape[0], rank)
        if adapter.get("use_dora"):
            shapes[f"base_model.model.{module}.lora_magnitude_vector"] = (shape[0],)
    return shapes


def verify(path: str | Path) -> None:
    """Check names, shapes and sizes of a saved model or adapter against what its configuration implies.

    Raises:
        CheckpointFault: the files are not what the configuration says.
        UserError: an adapter whose base is not here.
    """
    path = Path(path)
    if not is_adapter(path):
        compare_shapes(path, file_shapes(path), expected_shapes(load_config(path)))
        return
    adapter = read_json(path / "adapter_config.json")
    base = base_of(path)
    try:
        compare_shapes(path, file_shapes(path), expected_adapter_shapes(adapter, expected_shapes(load_config(base))))
    except CheckpointFault as fault:
        raise CheckpointFault(f"{fault} Its base is {base}; was the adapter trained on another model?") from None


def load_model(path: str | Path, *, dtype: torch.dtype | str = "auto", attn: str = "sdpa", device: Any = None) -> Any:
    """A Baichuan model, or an adapter on its base, in eval mode.

    Every tensor must be there and used: transformers and PEFT only warn about those that are not, and
    go on with random weights.

    Args:
        dtype: of the weights; ``auto`` is the file's.
        device: where it goes; None keeps it on the CPU.
    Raises:
        UserError: not a Baichuan model. CheckpointFault: weights that do not fit it.
    """
    from baichuan_sft.model.modeling_baichuan import BaichuanForCausalLM

    base = base_of(path)
    config = load_config(base)
    if list(Path(base).glob("*.safetensors")):
        known = {name: shape for name, shape in file_shapes(Path(base)).items() if "rotary_emb.inv_freq" not in name}
        compare_shapes(base, known, expected_shapes(config))
    try:
        model, info = BaichuanForCausalLM.from_pretrained(
            base, config=config, dtype=dtype, attn_implementation=attn, output_loading_info=True
        )
    except (OSError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise CheckpointFault(f"{base}: its weights cannot be read: {first}") from None
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(map(str, info[kind])):
            raise CheckpointFault(f"{base}: {len(keys)} {kind.replace('_', ' ')} in its weights, e.g. {keys[0]}.")
    if is_adapter(path):
        from peft import PeftModel

        verify(path)
        model = PeftModel.from_pretrained(model, path)
    return (model if device is None else model.to(device)).eval()
