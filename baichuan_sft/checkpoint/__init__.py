"""The one door for models and tokenizers on disk: load them, and verify that they are whole."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baichuan_sft.checkpoint.files import (
    QUANT_STATE,
    Shapes,
    base_of,
    check_against_manifest,
    check_base,
    file_shapes,
    is_adapter,
    read_json,
)
from baichuan_sft.checkpoint.quantised import (
    cast_whole,
    check_rows,
    check_same_quantization,
    check_settings,
    vendor_quantised,
)
from baichuan_sft.errors import CheckpointFault, UserError, first_line
from baichuan_sft.quantization import (
    quantization_config,
    require_bitsandbytes,
    stored_quantization,
    stored_shapes,
)

if TYPE_CHECKING:
    import torch

    from baichuan_sft.model.configuration_baichuan import BaichuanConfig
    from baichuan_sft.model.tokenization_baichuan import BaichuanTokenizer


def load_config(path: str | Path, *, vendor_packed: bool = False) -> BaichuanConfig:
    """Configuration of a model directory.

    Args:
        vendor_packed: let pass, and leave out, what says that the vendor's own code quantised it.
    Raises:
        UserError: no directory, no config.json, or not a Baichuan model.
    """
    from baichuan_sft.model.configuration_baichuan import BaichuanConfig

    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such directory.")
    if is_adapter(path) and not (path / "config.json").is_file():
        raise UserError(f"{path}: an adapter, not a model; its base is {base_of(path)}.")
    if not (path / "config.json").exists():
        raise UserError(
            f"{path}: not a model: there is no config.json in it; name the directory with the weights and "
            "their config.json."
        )
    raw = read_json(path / "config.json")
    if raw.get("model_type") != "baichuan":
        raise UserError(
            f"{path}: not a Baichuan model: config.json has model_type {raw.get('model_type')!r}, "
            "expected 'baichuan'."
        )
    for name, value in raw.items():
        nested = isinstance(value, dict) and "trust_remote_code" in value
        if name in ("_attn_implementation_internal", "trust_remote_code") or nested:
            raise UserError(f"{path / 'config.json'}: {name} could make transformers run code; remove it.")
    if not vendor_packed:
        check_settings(path, raw.get("quantization_config"))
    try:
        config = BaichuanConfig.from_pretrained(path)
        if vendor_packed and hasattr(config, "quantization_config"):
            del config.quantization_config
        stored_quantization(config)
        return config
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{path / 'config.json'}: {error}.") from None


def load_tokenizer(path: str | Path) -> BaichuanTokenizer:
    """Tokenizer of a model directory, of an adapter's, or of a bare ``tokenizer.model``.

    Raises:
        UserError: no such file, or no SentencePiece model in the directory.
    """
    from baichuan_sft.model.tokenization_baichuan import BaichuanTokenizer

    path = Path(path)
    file = path if path.is_file() else None
    if is_adapter(path) and not (path / "tokenizer.model").is_file():
        path = Path(base_of(path))
    if not file and not (path / "tokenizer.model").is_file():
        raise UserError(f"{path}: no tokenizer.model in it; copy the one of the base model there.")
    try:
        return BaichuanTokenizer(vocab_file=str(file)) if file else BaichuanTokenizer.from_pretrained(path)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path}: its tokenizer cannot be used: {first_line(error)}") from None


def check_vocabulary(path: str | Path, config: BaichuanConfig, tokenizer: BaichuanTokenizer) -> None:
    """
    Raises:
        UserError: the tokenizer gives ids that the model has no embedding for.
    """
    if config.vocab_size < len(tokenizer):
        raise UserError(
            f"{path}: the embedding has {config.vocab_size} rows, the tokenizer {len(tokenizer)} pieces: "
            "weights of one Baichuan generation with the tokenizer of the other."
        )


def expected_shapes(config: BaichuanConfig, found: Shapes | None = None) -> Shapes:
    """Name and shape of every tensor that the files of a model of this configuration have.

    Args:
        found: what they have; see ``stored_shapes``.
    """
    import torch

    from baichuan_sft.model.modeling_baichuan import BaichuanForCausalLM

    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in BaichuanForCausalLM(config).state_dict().items()}
    return stored_shapes(shapes, config, found or {})


def compare_shapes(path: str | Path, found: Shapes, expected: Shapes) -> None:
    """
    Raises:
        CheckpointFault: a tensor is missing, too many, or of another shape; names the first of each kind.
        UserError: the vendor's own code packed them; not every config.json says so.
    """
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    odd = sorted(name for name in expected.keys() & found.keys() if expected[name] != found[name])
    if any(name.endswith((".scale", QUANT_STATE)) for name in extra):
        raise vendor_quantised(path)
    faults = []
    if missing:
        faults.append(f"{len(missing)} tensors missing, e.g. {missing[0]}")
    if extra:
        faults.append(f"{len(extra)} tensors that do not belong, e.g. {extra[0]}")
    if odd:
        faults.append(
            f"{len(odd)} tensors of another shape, e.g. {odd[0]} {found[odd[0]]}, expected {expected[odd[0]]}"
        )
    if faults:
        raise CheckpointFault(f"{path}: does not fit its configuration: {'; '.join(faults)}.")


def expected_adapter_shapes(path: Path, base: BaichuanConfig) -> Shapes:
    """Name and shape of every tensor that PEFT makes of an adapter's configuration on this base.

    Raises:
        UserError: PEFT cannot put such an adapter on this base.
    """
    import torch
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict

    from baichuan_sft.model.modeling_baichuan import BaichuanForCausalLM

    read_json(path / "adapter_config.json")
    try:
        config = PeftConfig.from_pretrained(str(path))
        config.base_model_name_or_path = None  # PEFT warns where it is not the given model's
        if getattr(config, "init_lora_weights", True) is not True:
            config.init_lora_weights = True  # the others compute on the base's weights, which are not here
        with torch.device("meta"):
            model = get_peft_model(BaichuanForCausalLM(base), config)
    except (AttributeError, KeyError, TypeError, ValueError, re.error) as error:
        raise UserError(f"{path}: PEFT cannot put this adapter on its base: {first_line(error)}") from None
    return {
        name: tuple(t.shape)
        for name, t in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }


def verify(path: str | Path, base: str | None = None) -> None:
    """Check names, shapes and sizes of a saved model or adapter against what its configuration implies.

    Args:
        base: of an adapter; None: where adapter_config.json says.
    Raises:
        CheckpointFault: the files are not what the configuration says.
        UserError: an adapter whose base is not here, or is another model.
    """
    path = Path(path)
    if not is_adapter(path):
        found = file_shapes(path)
        compare_shapes(path, found, expected_shapes(load_config(path), found))
        return
    base = base or base_of(path)
    expected, found = expected_adapter_shapes(path, load_config(base)), file_shapes(path)
    try:
        compare_shapes(path, found, expected)
    except CheckpointFault as fault:
        raise UserError(
            f"{fault} Its base is {base}; if it was trained on another model, set base_model_name_or_path in "
            "adapter_config.json to that one."
        ) from None


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    attn: str = "sdpa",
    device: Any = None,
    quantize: str | None = None,
    check_files: bool = True,
) -> Any:
    """A Baichuan model, or an adapter on its base, in eval mode.

    Every tensor must be there and used: transformers and PEFT only warn about those that are not, and
    go on with random weights.

    Args:
        dtype: of the weights; ``auto`` is the file's.
        device: where it goes; None keeps it on the CPU.
        quantize: a name in QUANTIZATIONS; a directory that is quantised already takes its own alone.
        check_files: compare the files with the manifest that training left beside them, at 1 to
            1.5 GB/s for each of up to 8 files at a time.
    Raises:
        UserError: not a Baichuan model. CheckpointFault: weights that do not fit it, or are not as saved.
    """
    import baichuan_sft.attention  # noqa: F401  (makes its backends known)
    from baichuan_sft.model.modeling_baichuan import BaichuanForCausalLM

    base = base_of(path)
    if check_files:
        for directory in {str(path), base}:
            check_against_manifest(Path(directory))
        check_base(Path(path))
    config = load_config(base)
    known = {name: s for name, s in file_shapes(Path(base)).items() if "rotary_emb.inv_freq" not in name}
    compare_shapes(base, known, expected_shapes(config, known))
    if (settings := Path(base) / "generation_config.json").is_file():
        read_json(settings)  # of a damaged one transformers says nothing and takes its own
    options: dict[str, Any] = {}
    stored = stored_quantization(config)
    if stored is not None:
        check_same_quantization(base, stored, quantize)
        require_bitsandbytes(f"{base}, which is {stored},")
        if dtype != "auto":
            config.quantization_config["bnb_4bit_compute_dtype"] = str(dtype).removeprefix("torch.")
    elif quantize is not None:
        compute = config.dtype if dtype == "auto" else dtype
        options["quantization_config"] = quantization_config(quantize, compute)
    if quantized := stored or quantize:
        check_rows(base, config, quantized)
        # Each layer is quantised when it reaches its device; moved afterwards, the whole would pass through.
        options["device_map"] = {"": device or "cpu"}
    try:
        loaded: Any = BaichuanForCausalLM.from_pretrained(
            base, config=config, dtype=dtype, attn_implementation=attn, output_loading_info=True, **options
        )
    except (LookupError, OSError, RuntimeError) as error:
        raise CheckpointFault(f"{base}: its weights cannot be read: {first_line(error)}") from None
    model, info = loaded
    if stored is not None:
        cast_whole(model)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]), info
    if is_adapter(path):
        from peft import PeftModel
        from transformers import GenerationConfig

        verify(path)
        settings = Path(path) / "generation_config.json"
        if settings.is_file():  # PEFT would keep the base's
            model.generation_config = GenerationConfig.from_dict(read_json(settings))
        model = PeftModel.from_pretrained(model, path)
    return (model if device is None or quantized else model.to(device)).eval()
