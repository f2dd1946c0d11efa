"""Directories whose linears are packed already: which are read, and what may be asked of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from baichuan_sft.errors import UserError
from baichuan_sft.quantization import BLOCK, stored_quantization


def check_settings(path: Path, settings: Any) -> None:
    """
    Args:
        settings: ``quantization_config`` of a config.json, or None.
    Raises:
        UserError: the weights are packed, and not by bitsandbytes.
    """
    if not settings:
        return
    if not isinstance(settings, dict) or "quant_method" not in settings:
        raise vendor_quantised(path)
    packed = settings.get("load_in_8bit") or settings.get("load_in_4bit")
    if settings["quant_method"] != "bitsandbytes" or not packed:
        raise UserError(
            f"{path}: quantised by {settings['quant_method']!r}, which nothing here reads; take the 16-bit "
            "model, and --quantize nf4 or int8."
        )


def vendor_quantised(path: str | Path) -> UserError:
    return UserError(
        f"{path}: weights that the vendor's own code quantised, which cannot be trained; take the 16-bit "
        "model, and --quantize nf4 or int8. Without one: baichuan-sft convert DIR OUT --dequantize."
    )


def check_same_quantization(path: str | Path, stored: str, quantize: str | None) -> None:
    """
    Raises:
        UserError: other bits are asked of weights that are quantised already.
    """
    if quantize not in (None, stored):
        raise UserError(
            f"{path}: is quantised already ({stored}); --quantize {quantize} would round it twice. Leave it "
            "out, or take the 16-bit model."
        )


def check_rows(path: str | Path, config: Any, quantization: str) -> None:
    """
    Args:
        quantization: of the model, on disk or once it is loaded.
    Raises:
        UserError: a row of a linear is no whole number of NF4 blocks.
    """
    widths = [width for width in (config.hidden_size, config.intermediate_size) if width % BLOCK]
    if widths and quantization != "int8":
        raise UserError(
            f"{path}: has linears with rows of {widths[0]}, no multiple of {BLOCK}; in 4 bits bitsandbytes "
            "computes other numbers from them on CPUs with AVX-512. Take int8, or the 16-bit model."
        )


def check_trainable(path: str | Path, config: Any, quantize: str | None) -> None:
    """
    Args:
        quantize: what the run says of its base, which goes with LoRA alone.
    Raises:
        UserError: the base is quantised on disk, and the run does not say so: it would train nothing.
    """
    stored = stored_quantization(config)
    if stored is not None and quantize != stored:
        raise UserError(
            f"{path}: is quantised ({stored}), so only adapters on it can be trained: "
            f"--use_lora True --quantize {stored}; or take the 16-bit model."
        )


def cast_whole(model: Any) -> None:
    """Give the weights that are not packed the dtype that was asked for: transformers leaves the file's."""
    import torch

    for weight in model.parameters():
        if type(weight) is torch.nn.Parameter and weight.is_floating_point():
            weight.data = weight.data.to(model.config.dtype)
