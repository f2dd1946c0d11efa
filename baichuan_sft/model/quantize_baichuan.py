"""``quantize(8)`` and ``quantize(4)`` of a loaded model, and the vendor's other spellings of it."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import BitsAndBytesConfig
from transformers.quantizers import AutoHfQuantizer

# bits -> arguments of BitsAndBytesConfig: LLM.int8(), and NF4 whose scales are quantised too
BITS: dict[int, dict[str, Any]] = {
    8: {"load_in_8bit": True},
    4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
}


def bitsandbytes_config(bits: int, dtype: Any = None) -> BitsAndBytesConfig:
    """What quantises the decoder's linear layers; the head computes its loss from a weight it can read.

    Raises:
        ValueError: neither 8 nor 4 bits.
    """
    if bits not in BITS:
        raise ValueError(f"quantize({bits!r}): a Baichuan model is quantised to 8 bits or to 4")
    return BitsAndBytesConfig(**BITS[bits], bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=["lm_head"])


def compute_as_stored(model: nn.Module) -> None:
    """Have bitsandbytes give the same numbers from 4-bit weights on every CPU.

    On one with AVX512-BF16 the first forward in eval mode would rewrite them: scales rounded to bf16,
    products in bf16 whatever the dtype, and no gradient through them ever after. That is switched off.

    Raises:
        ValueError: rows that are no whole number of blocks, which its AVX-512 kernels read with wrong scales.
    """
    for name, module in model.named_modules():
        if type(getattr(module, "weight", None)).__name__ != "Params4bit":
            continue
        linear: Any = module
        if linear.in_features % linear.weight.blocksize:
            raise ValueError(
                f"{name}: rows of {linear.in_features} are no multiple of {linear.weight.blocksize}, so some "
                "CPUs would compute other numbers from 4 bits; take 8"
            )
        linear.support_avx512bf16_for_cpu = False


class QuantizeMixin:
    """Adds ``quantize()`` and movable 8-bit weights to a transformers model; stands before its base."""

    def quantize(self, bits: int) -> Any:
        """Quantise this model where it is, layer by layer; the whole weights are given up on the way.

        Bit for bit what loading with ``BitsAndBytesConfig`` gives, so it is saved and loaded like that.

        Returns:
            the model itself, of which ``.cuda()`` may follow.
        Raises:
            ValueError: neither 8 nor 4 bits, a model that is quantised, or one spread over several devices;
                4 bits for rows that are no multiple of 64.
            ImportError: bitsandbytes is not installed.
        """
        model: Any = self
        config = bitsandbytes_config(bits, model.dtype)
        if getattr(model, "hf_quantizer", None) is not None:
            raise ValueError(f"quantize({bits}): this model is quantised already; load the whole one")
        # PEFT's layers: their A and B are linears too
        if any(hasattr(module, "base_layer") for module in model.modules()):
            raise ValueError(f"quantize({bits}): an adapter is on it; quantise its base and load it on that")
        devices = {parameter.device for parameter in model.parameters()}
        if len(devices) > 1 or "meta" in {device.type for device in devices}:
            raise ValueError(f"quantize({bits}): the model is spread by device_map; load it without")
        device_map = {"": devices.pop()}
        quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
        quantizer.validate_environment(device_map=device_map)
        whole = {name: module.weight for name, module in model.named_modules() if type(module) is nn.Linear}
        quantizer.preprocess_model(model, dtype=model.dtype, device_map=device_map)  # empty modules in place
        for name in list(whole):
            module, weight = model.get_submodule(name), whole.pop(name)
            fields = module.weight.__dict__
            # From the CPU: there bitsandbytes takes a move for the order to quantise.
            empty = type(module.weight)(weight.data.cpu(), requires_grad=False, **fields)
            module.weight = empty.to(weight.device)
        model.hf_quantizer = quantizer
        quantizer.postprocess_model(model)
        compute_as_stored(model)
        return model.train(model.training)

    @classmethod
    def from_pretrained(
        cls, *args: Any, load_in_8bit: bool = False, load_in_4bit: bool = False, **kwargs: Any
    ) -> Any:
        """As of transformers, with the two arguments that its fifth version no longer takes.

        Raises:
            ValueError: more than one way to quantise.
        """
        wanted = [bits for bits, given in ((8, load_in_8bit), (4, load_in_4bit)) if given]
        if len(wanted) + (kwargs.get("quantization_config") is not None) > 1:
            raise ValueError("load_in_8bit, load_in_4bit and quantization_config exclude each other")
        if wanted:
            dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
            kwargs["quantization_config"] = bitsandbytes_config(wanted[0], None if dtype == "auto" else dtype)
        loaded: Any = super().from_pretrained(*args, **kwargs)  # type: ignore[misc]
        compute_as_stored(loaded[0] if isinstance(loaded, tuple) else loaded)  # with output_loading_info
        return loaded

    def cuda(self, device: Any = None) -> Any:
        """Onto the GPU, 8-bit models too, which transformers refuses since they could not be moved once."""
        module: Any = self
        return nn.Module.cuda(module, device)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves; and takes along the row scales of 8-bit weights, which lie beside the parameter."""
        super()._apply(fn, recurse)  # type: ignore[misc]
        if getattr(self, "is_loaded_in_8bit", False):
            for module in self.modules():  # type: ignore[attr-defined]
                holder: Any
                for holder in (getattr(module, "weight", None), getattr(module, "state", None)):
                    if getattr(holder, "SCB", None) is not None:
                        holder.SCB = holder.SCB.to(module.weight.device)
                        holder.CB = module.weight.data  # one memory, not the copy of before
        return self
