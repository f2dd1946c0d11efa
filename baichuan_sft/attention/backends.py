"""The table of backends, and which one a run takes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from baichuan_sft.attention.flex import flex, flex_mask
from baichuan_sft.attention.kernels import (
    alibi_of_longest,
    augmentation,
    augmented,
    block_diagonal,
    run_starts,
    segments,
    varlen,
    with_layout,
    xformers,
)
from baichuan_sft.attention.layout import layout_or_bias
from baichuan_sft.errors import EnvironmentFault, UserError, suggest
from baichuan_sft.model.attention_baichuan import PREPARE, eager_attention_forward


@dataclass(frozen=True)
class Backend:
    """
    Attributes:
        attend: transformers' attention interface.
        make_extra: see ``layout_or_bias``; None: the backend takes the additive mask.
        why_not: ``(device type, dtype) -> reason`` that it cannot train there, or None.
    """

    attend: Callable
    make_extra: Callable | None
    why_not: Callable[[str, torch.dtype], str | None]


def _anywhere(device: str, dtype: torch.dtype) -> None:
    return None


def _needs_flash(device: str, dtype: torch.dtype) -> str | None:
    if device != "cuda":
        return "torch's flash kernel for runs needs a CUDA GPU"
    if dtype == torch.float32:
        return "torch's flash kernel for runs computes in bf16 or fp16, not in fp32"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} is older than compute capability 8.0"
    return None


def _needs_triton(device: str, dtype: torch.dtype) -> str | None:
    if device != "cuda":
        return "FlexAttention has no backward on a CPU"
    return _import_error("triton")


def _needs_xformers(device: str, dtype: torch.dtype) -> str | None:
    return "xformers needs a CUDA GPU" if device != "cuda" else _import_error("xformers.ops")


def _import_error(module: str) -> str | None:
    try:
        __import__(module)
    except Exception as error:  # a build for another torch fails in many ways
        return f"{module.partition('.')[0]} cannot be imported ({type(error).__name__}: {error})"
    return None


BACKENDS = {
    "eager": Backend(eager_attention_forward, None, _anywhere),
    "sdpa": Backend(ALL_ATTENTION_FUNCTIONS["sdpa"], None, _anywhere),
    "segments": Backend(with_layout(augmented(segments)), alibi_of_longest, _anywhere),
    "augmented": Backend(
        with_layout(augmented(segments)),
        lambda config, hidden, runs, lengths: augmentation(config, hidden, lengths, None),
        _anywhere,
    ),
    "varlen": Backend(with_layout(augmented(varlen)), run_starts, _needs_flash),
    "flex": Backend(with_layout(flex), flex_mask, _needs_triton),
    "xformers": Backend(with_layout(augmented(xformers)), block_diagonal, _needs_xformers),
}
# Which to try, best first; the last works everywhere.
PREFERENCES = {
    "cpu": ("segments",),
    "rope": ("varlen", "flex", "xformers", "segments"),
    "alibi": ("flex", "varlen", "xformers", "segments"),
}

for _name, _backend in BACKENDS.items():
    if _backend.make_extra is not None:
        ALL_ATTENTION_FUNCTIONS.register(_name, _backend.attend)
        PREPARE[_name] = functools.partial(layout_or_bias, _backend.make_extra)
        # With a static cache generate() makes the mask by name, and none for a name that it does not know.
        ALL_MASK_ATTENTION_FUNCTIONS.register(_name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def choose(name: str, position: str, device: str, dtype: torch.dtype) -> tuple[str, str]:
    """Backend to train with, and why it is that one.

    Args:
        name: as asked for, or ``auto``.
        position: ``rope`` or ``alibi``.
        device: ``cpu`` or ``cuda``. dtype: in which attention is computed.
    Raises:
        UserError: unknown name. EnvironmentFault: one that cannot train on this machine.
    """
    if name == "auto":
        reasons: list[str] = []
        for candidate in PREFERENCES["cpu" if device == "cpu" else position]:
            reason = BACKENDS[candidate].why_not(device, dtype)
            if reason is None:
                where = f"{position} on {'a CPU' if device == 'cpu' else 'this GPU'}"
                return candidate, "; ".join([f"the fastest here for {where}", *reasons])
            reasons.append(f"not {candidate}: {reason}")
    if name not in BACKENDS:
        raise UserError(
            f"--attn {name}: no such backend{suggest(name, list(BACKENDS)) or '.'} "
            f"Known: auto, {', '.join(BACKENDS)}."
        )
    if reason := BACKENDS[name].why_not(device, dtype):
        raise EnvironmentFault(f"--attn {name}: {reason}. --attn auto picks one that works here.")
    if device != "cpu" and BACKENDS[name].make_extra is None:
        return name, "as asked for; packed rows and ALiBi make it build a T x T mask"
    return name, "as asked for"
