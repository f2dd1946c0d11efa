"""Linear layers in 8 or 4 bits, and 8-bit optimizers, both through bitsandbytes; where a model is put."""

from __future__ import annotations

import importlib.util
import math
from typing import TYPE_CHECKING, Any

from baichuan_sft.arguments import DTYPES, Parser
from baichuan_sft.errors import EnvironmentFault, first_line, pick
from baichuan_sft.variants import LINEARS

if TYPE_CHECKING:
    import torch

Shapes = dict[str, tuple[int, ...]]

# name -> arguments of transformers' BitsAndBytesConfig
QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "int8": dict(load_in_8bit=True),  # LLM.int8(): activations too, less the outliers
    "nf4": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
}
# The head computes the loss itself from a weight that it can read; embeddings are never quantised.
KEPT = ["lm_head"]
# NF4 weights that share a scale, scales that share one, entries of the code and of that of the scales.
BLOCK, NESTED_BLOCK, CODE, NESTED_CODE = 64, 256, 16, 256


def add_model_options(parser: Parser) -> None:
    """How a model is loaded, by all commands that talk to one."""
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (auto: as stored)")
    parser.add_argument(
        "--quantize", choices=QUANTIZATIONS, help="linear layers in 8 or 4 bits (bitsandbytes)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (cuda where there is one)")


def device(name: str | None) -> str:
    """The device of ``--device``, of which a tensor was asked; None: a GPU where there is one.

    Raises:
        EnvironmentFault: no such device, or one that holds no numbers.
    """
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # an assertion where torch is built without CUDA
        raise EnvironmentFault(f"--device {name}: {first_line(error)}") from None
    if found.type == "meta":
        raise EnvironmentFault(f"--device {name}: holds no numbers; give cpu, cuda, cuda:1, ...")
    return str(found)


def require_bitsandbytes(what: str) -> None:
    """
    Args:
        what: the option that needs it, for the message.
    Raises:
        EnvironmentFault: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise EnvironmentFault(f"{what} needs bitsandbytes: pip install 'baichuan-sft[gpu]'.")


def quantization_config(name: str, dtype: torch.dtype | str | None) -> Any:
    """transformers' ``BitsAndBytesConfig`` of ``int8`` or ``nf4``, which computes in ``dtype`` (None: fp32).

    Raises:
        UserError: an unknown name. EnvironmentFault: bitsandbytes is not installed.
    """
    options = pick("quantisation", name, QUANTIZATIONS)
    require_bitsandbytes(f"quantisation {name}")
    import logging

    from transformers import BitsAndBytesConfig

    # At every call it would say that int8 products take fp16 inputs.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return BitsAndBytesConfig(**options, bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=KEPT)


def quantization_of(model: Any) -> str | None:
    """What a loaded model's linears are in: a name in QUANTIZATIONS, or "fp4"; None for whole weights."""
    quantizer = getattr(model, "hf_quantizer", None)
    return None if quantizer is None else _name(quantizer.quantization_config)


def stored_quantization(config: Any) -> str | None:
    """The same of a saved model's configuration; ``load_config`` let only bitsandbytes' pass."""
    settings = getattr(config, "quantization_config", None)
    return None if settings is None else _name(_settings(settings))


def _name(settings: Any) -> str:
    return "int8" if settings.load_in_8bit else settings.bnb_4bit_quant_type


def _settings(settings: Any) -> Any:
    """As transformers' ``BitsAndBytesConfig``; raises ValueError or TypeError where it is none."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig.from_dict(settings) if isinstance(settings, dict) else settings


def stored_shapes(shapes: Shapes, config: Any, found: Shapes) -> Shapes:
    """Name and shape of every tensor of a saved model, where bitsandbytes packed its linears.

        int8   X.weight (out, in), its rows' scales X.SCB (out,), X.weight_format
        nf4    X.weight (out * in / 2, 1), its blocks' scales X.weight.absmax, their own
               X.weight.nested_absmax, both codes, and X.weight.quant_state.bitsandbytes__nf4, a text

    Args:
        shapes: of the model with whole weights, which is returned where ``config`` says nothing else.
        found: what is in the files; the text's length is taken from there.
    """
    if (name := stored_quantization(config)) is None:
        return shapes
    from transformers.quantizers.quantizers_utils import should_convert_module

    settings = _settings(config.quantization_config)
    kept = settings.llm_int8_skip_modules or KEPT
    result = dict(shapes)
    for weight, shape in shapes.items():
        module = weight.removesuffix(".weight")
        if module.rpartition(".")[2] not in LINEARS or not should_convert_module(module, kept):
            continue
        if name == "int8":
            result |= {f"{module}.SCB": shape[:1], f"{module}.weight_format": ()}
            continue
        num_blocks = math.ceil(math.prod(shape) / BLOCK)
        num_stored = math.ceil(math.prod(shape) / (2 * settings.bnb_4bit_quant_storage.itemsize))
        text = f"{weight}.quant_state.bitsandbytes__{name}"
        result |= {weight: (num_stored, 1), f"{weight}.absmax": (num_blocks,), f"{weight}.quant_map": (CODE,)}
        result[text] = found.get(text, ())
        if settings.bnb_4bit_use_double_quant:
            result[f"{weight}.nested_absmax"] = (math.ceil(num_blocks / NESTED_BLOCK),)
            result[f"{weight}.nested_quant_map"] = (NESTED_CODE,)
    return result


def num_elements(parameter: Any) -> int:
    """Elements of a weight, also where two of them share a byte, or ZeRO-3 holds a part here."""
    state = getattr(parameter, "quant_state", None)
    whole = parameter.numel() if state is None else math.prod(state.shape)
    return getattr(parameter, "ds_numel", whole)


def weight_bytes(model: Any) -> int:
    """Bytes of the weights as they lie in memory, scales of quantised ones included."""
    total = 0
    for module in model.modules():
        for weight in module.parameters(recurse=False):
            total += weight.numel() * weight.element_size()
            total += sum(t.numel() * t.element_size() for t in _scales(module, weight))
    return total


def _scales(module: Any, weight: Any) -> list[Any]:
    """Tensors beside a quantised weight: int8's row scales; NF4's block scales and the scales of these."""
    import torch

    row_scales = getattr(weight, "SCB", None)
    if row_scales is None:  # the first forward moves them
        row_scales = getattr(getattr(module, "state", None), "SCB", None)
    outer = getattr(weight, "quant_state", None)
    states = [state for state in (outer, getattr(outer, "state2", None)) if state is not None]
    found = [row_scales, *(t for state in states for t in (state.absmax, state.code, state.offset))]
    return [t for t in found if isinstance(t, torch.Tensor)]
