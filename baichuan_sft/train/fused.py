"""Elementwise work fused: each decoder block compiled by itself, or Liger's kernels in it.

    --torch_compile True      norms, RoPE, SwiGLU, sums and adapters become a few kernels of inductor's
    --use_liger_kernel True   norms, RoPE and the SwiGLU product become Liger's; the loss stays the head's

Neither is left to transformers, which would compile the whole model anew for each shape of a batch, and
knows no Liger kernels of this model. Parameters, their names and the files saved stay as they are.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch

from baichuan_sft.errors import EnvironmentFault, UserError, first_line
from baichuan_sft.model.modeling_baichuan import (
    BaichuanAttention,
    BaichuanDecoderLayer,
    BaichuanMLP,
    BaichuanRMSNorm,
)

# What is done here, so that transformers is not told of it: flag -> what turns it off there.
FLAGS = {"torch_compile": False, "torch_compile_backend": None, "torch_compile_mode": None} | {
    "use_liger_kernel": False
}
BACKENDS = ("inductor", "aot_eager", "eager")
MODES = ("default", "max-autotune-no-cudagraphs")


def check_fused(values: dict[str, Any], zero_stage: int) -> None:
    """
    Raises:
        UserError: a backend or mode that does not go with rows of many lengths, or two ways at once.
    """
    for name, known, why in (
        ("torch_compile_backend", BACKENDS, ""),
        ("torch_compile_mode", MODES, ": CUDA graphs want one shape, and rows differ in length"),
    ):
        value = values[name]
        if value is not None and value not in known:
            raise UserError(f"--{name} {value} is not possible{why}; choose from {', '.join(known)}.")
        values["torch_compile"] = values["torch_compile"] or value is not None  # as transformers has it
    if values["torch_compile_mode"] and values["torch_compile_backend"] not in (None, "inductor"):
        raise UserError(
            f"--torch_compile_mode {values['torch_compile_mode']} is a mode of inductor; leave it out, or "
            f"--torch_compile_backend {values['torch_compile_backend']}."
        )
    if values["torch_compile"] and values["use_liger_kernel"]:
        raise UserError("--torch_compile and --use_liger_kernel are both given and fuse the same; keep one.")
    if values["torch_compile"] and zero_stage == 3:
        raise UserError(
            f"--torch_compile True is not possible with ZeRO-3 ({values['deepspeed']}): it gathers weights "
            "inside what is compiled. Use ZeRO-2, or leave the flag out."
        )


def require_fused(values: dict[str, Any]) -> None:
    """Try what was asked for on this machine, before anything is read.

    Raises:
        EnvironmentFault: no C++ compiler, no triton, no Liger, no GPU for it.
    """
    if values["torch_compile"]:
        backend = values["torch_compile_backend"] or "inductor"
        device = "cpu" if values["use_cpu"] else "cuda"
        try:
            torch.compile(_probe, backend=backend)(torch.ones(8, device=device))
        except Exception as error:  # anything that a compiler, a linker or triton may say
            need = "a C++ compiler (g++)" + ("" if values["use_cpu"] else " and triton (pip install triton)")
            raise EnvironmentFault(
                f"--torch_compile True: {backend} cannot compile on this machine: {first_line(error)}. "
                f"It needs {need}; install what is missing, or leave the flag out."
            ) from None
    if values["use_liger_kernel"]:
        if values["use_cpu"]:
            raise EnvironmentFault(
                "--use_liger_kernel True: Liger's kernels need a CUDA GPU, this run is on the CPU; "
                "--torch_compile True fuses there too, or leave the flag out."
            )
        try:
            _liger()
        except Exception as error:  # transformers' is_liger_kernel_available() looks at the name only
            raise EnvironmentFault(
                f"--use_liger_kernel True: liger-kernel cannot be imported: {first_line(error)}. "
                "pip install liger-kernel triton, or use --torch_compile True, or leave the flag out."
            ) from None


def _probe(x: torch.Tensor) -> torch.Tensor:
    return (x * x).sum().rsqrt() * x


def fuse(model: Any, values: dict[str, Any]) -> None:
    """What the flags ask for, on a model that has its adapters."""
    if values["torch_compile"]:
        compile_blocks(model, values["torch_compile_backend"], values["torch_compile_mode"])
    if values["use_liger_kernel"]:
        use_liger(model)


# --- torch.compile ----------------------------------------------------------------------------------


def compile_blocks(model: Any, backend: str | None = None, mode: str | None = None) -> None:
    """Compile the decoder blocks one by one, in place: all share the graphs of the first.

    dynamic: rows and batches differ in size, and each size would be compiled by itself.
    """
    for block in model.modules():
        if isinstance(block, BaichuanDecoderLayer):
            block.forward = _compiled_forward(  # type: ignore[method-assign]
                block, backend=backend or "inductor", mode=mode, dynamic=True
            )


def _compiled_forward(block: Any, **options: Any) -> Callable[..., Any]:
    """The block's forward, compiled below activation checkpointing.

    Above it, which is where ``block.compile()`` puts it, nothing would be: torch runs a checkpoint whose
    inside cannot be one graph, and attention breaks it in two, without compiling any of it.
    """
    forward = type(block).forward
    # transformers checkpoints in forward; older ones in __call__, above what is replaced here
    checkpoints = hasattr(forward, "__wrapped__")
    compiled = torch.compile(types.MethodType(inspect.unwrap(forward), block), **options)

    def run(*args: Any, **kwargs: Any) -> Any:
        if checkpoints and block.gradient_checkpointing and block.training:
            return block._gradient_checkpointing_func(functools.partial(compiled, **kwargs), *args)
        return compiled(*args, **kwargs)

    return run


# --- Liger ------------------------------------------------------------------------------------------


def _liger() -> tuple[Any, Any, Any]:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.rope import LigerRopeFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerRMSNormFunction, LigerRopeFunction, LigerSiLUMulFunction


def use_liger(model: Any) -> None:
    """Liger's RMSNorm, RoPE and SwiGLU product in ``model``'s modules; ALiBi has no RoPE to replace."""
    norm, rope, product = _liger()

    def rms_norm(module: Any, hidden: torch.Tensor) -> torch.Tensor:
        # "llama": statistics in fp32, the weight times what is rounded, as BaichuanRMSNorm.
        # Not in place: the incoming gradient belongs to whoever gave it.
        return norm.apply(hidden, module.weight, module.eps, 0.0, "llama", False)

    def mlp(module: Any, hidden: torch.Tensor) -> torch.Tensor:
        return module.down_proj(product.apply(module.gate_proj(hidden), module.up_proj(hidden)))

    def rotate(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value = qkv.unbind(dim=2)  # (B, T, N, H); Liger copies the first two, which are strided
        angles = (x[:, :, 0, 0].repeat(1, 1, 2) for x in (cos, sin))  # (B or 1, T, H)
        query, key = rope.apply(query.transpose(1, 2), key.transpose(1, 2), *angles)
        return query, key, value.clone().transpose(1, 2)  # a view would keep all of qkv for backward

    replacements = {BaichuanRMSNorm: ("forward", rms_norm), BaichuanMLP: ("forward", mlp)}
    for module in model.modules():
        if type(module) in replacements:
            name, function = replacements[type(module)]
            setattr(module, name, types.MethodType(function, module))
        elif isinstance(module, BaichuanAttention):
            module.rotate = rotate
