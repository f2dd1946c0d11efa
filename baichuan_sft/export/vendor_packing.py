"""The vendor's own packings of a linear layer's weight, taken apart.

    Baichuan-13B int8   X.weight int8 (in, out), X.scale (out,)
    Baichuan-13B int4   X.weight int32 (out, in / 8), X.scale (out,); channel 8k + n in bits 4n to 4n + 3
    Baichuan2 4bits     X.weight.data uint8, X.weight.quant_state: the list that bitsandbytes kept before 0.41

Source: ``quantizer.py`` of baichuan-inc/Baichuan-13B-Chat-int8 and Baichuan2-13B-Chat-4bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from baichuan_sft.checkpoint.files import QUANT_STATE
from baichuan_sft.errors import CheckpointFault, first_line
from baichuan_sft.quantization import CODE, NESTED_CODE, require_bitsandbytes

if TYPE_CHECKING:
    import torch


def packed_weights(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Each packed weight with the two entries of the file that it is made of; empty where nothing is."""
    found, names = {}, set(names)
    for name in sorted(names):
        if name.endswith(QUANT_STATE):
            weight = name.removesuffix(".quant_state")
            found[weight] = (f"{weight}.data", name)
        elif name.endswith(".scale"):
            weight = f"{name.removesuffix('.scale')}.weight"
            found[weight] = (weight, name)
    return {weight: entries for weight, entries in found.items() if names.issuperset(entries)}


def unpack(name: str, tensors: Mapping[str, Any]) -> torch.Tensor:
    """One weight of ``packed_weights`` as fp32 ``(out, in)``: every stored number times its scale.

    Args:
        tensors: has the two entries, read.
    Raises:
        CheckpointFault: they are no packing known here. EnvironmentFault: 4 bits without bitsandbytes.
    """
    import torch

    packed = tensors.get(f"{name}.data", tensors.get(name))
    scale = tensors.get(f"{name.removesuffix('.weight')}.scale", tensors.get(f"{name}.quant_state"))
    if isinstance(packed, torch.Tensor) and isinstance(scale, list):
        return _unpack_nf4(name, packed, scale)
    known = isinstance(packed, torch.Tensor) and isinstance(scale, torch.Tensor) and packed.dim() == 2
    if known and packed.dtype == torch.int8 and scale.shape == packed.shape[1:]:
        return packed.T.float() * scale.float()[:, None]
    if known and packed.dtype == torch.int32 and scale.shape == packed.shape[:1]:
        return _signed_nibbles(packed).float() * scale.float()[:, None]
    raise CheckpointFault(f"{name}: quantised in a way that is not the vendor's; take the 16-bit model.")


def _signed_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """int32 ``(out, in / 8)`` to int32 ``(out, in)`` of -8 to 7.

        0x...21f -> -1, 1, 2, ...        (the lowest bits are the first channel)

    The vendor's own code does this on a GPU only, in a compiled kernel; that it extends the sign is what its
    packing implies.
    """
    import torch

    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    nibbles = (packed[..., None] >> shifts) & 0xF
    return (nibbles - 16 * (nibbles > 7)).flatten(1)


def _unpack_nf4(name: str, packed: torch.Tensor, state: list[Any]) -> torch.Tensor:
    """By bitsandbytes, whose state was ``[absmax, shape, dtype, block, [offset, [absmax, code, block, ...]],
    "nf4", code]``; without double quantisation the fifth is None."""
    require_bitsandbytes(f"unpacking {name}")
    from bitsandbytes.functional import QuantState, dequantize_4bit

    try:
        absmax, shape, dtype, block, nested, kind, code = state
        if kind != "nf4":
            raise ValueError(f"of type {kind!r}, expected 'nf4'")
        offset, outer = None, None
        num_blocks = math.ceil(math.prod(shape) / block)
        if shape[-1] % block:  # its kernels for AVX-512 take the scales of other weights
            raise ValueError(f"rows of {shape[-1]} are no multiple of its blocks of {block}")
        packed = _sized(packed, math.ceil(math.prod(shape) / 2), "weights").view(-1, 1)
        absmax, code = _sized(absmax, num_blocks, "scales"), _sized(code, CODE, "codes")
        if nested is not None:
            offset, (scales, outer_code, size, *_) = nested
            scales = _sized(scales, math.ceil(num_blocks / size), "scales of scales").float()
            outer_code = _sized(outer_code, NESTED_CODE, "codes of scales").float()
            outer = QuantState(absmax=scales, code=outer_code, blocksize=size, dtype=offset.dtype)
        options = dict(shape=shape, dtype=dtype, blocksize=block, code=code, quant_type=kind, offset=offset)
        return dequantize_4bit(packed, QuantState(absmax=absmax, state2=outer, **options)).float()
    except (ArithmeticError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointFault(
            f"{name}: its quant_state is not bitsandbytes' ({first_line(error)}); take the 16-bit model."
        ) from None


def _sized(tensor: torch.Tensor, length: int, what: str) -> torch.Tensor:
    """As it is: bitsandbytes' kernels read so many numbers in a row, whether they are there or not."""
    if tensor.numel() != length:
        raise ValueError(f"{tensor.numel()} {what}, expected {length}")
    return tensor.contiguous()
