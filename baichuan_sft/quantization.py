"""Linear layers in 8 or 4 bits, and 8-bit optimizers, both through bitsandbytes."""

from __future__ import annotations

import importlib.util
import math
from typing import TYPE_CHECKING, Any

from baichuan_sft.errors import EnvironmentFault, pick

if TYPE_CHECKING:
    import torch

# name -> arguments of transformers' BitsAndBytesConfig
QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "int8": dict(load_in_8bit=True),  # LLM.int8(): activations too, less the outliers
    "nf4": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
}
# The head computes the loss itself from a weight that it can read; embeddings are never quantised.
KEPT = ["lm_head"]


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
    """The name in QUANTIZATIONS under which a model was loaded; None for whole weights."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return None
    return "int8" if quantizer.quantization_config.load_in_8bit else "nf4"


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
