"""Is what was saved what was trained? A few tokens through the live model and through the saved one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from baichuan_sft.checkpoint import load_model
from baichuan_sft.errors import CheckpointFault
from baichuan_sft.train.processes import outside_zero3

# Of the largest logit: what another device and kernel round differently, TF32's 10 bits included.
RELOAD_TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 1e-1, torch.float16: 1e-1}
PROBE_TOKENS = 16


@torch.no_grad()
def probe(model: Any, vocab_size: int) -> torch.Tensor:
    """Logits of 16 tokens from all over the vocabulary, on the CPU, in the dtype that the model gives."""
    tokens = torch.arange(PROBE_TOKENS)[None] * (vocab_size // PROBE_TOKENS)
    was_training = model.training
    model.eval()
    logits = model(input_ids=tokens.to(next(model.parameters()).device)).logits
    model.train(was_training)
    return logits.cpu()


def compare_reloaded(path: Path, live: torch.Tensor, dtype: torch.dtype, quantize: str | None) -> None:
    """
    Raises:
        CheckpointFault: what lies on disk does not give the ``live`` logits.
    """
    with outside_zero3(), torch.random.fork_rng(devices=[]):
        reloaded = load_model(path, dtype=dtype, quantize=quantize, check_files=False)
        saved = probe(reloaded, reloaded.config.vocab_size).float()
    tolerance = RELOAD_TOLERANCE[live.dtype]  # under autocast fp32 weights give half-precision logits
    live = live.float()
    gap, scale = (live - saved).abs().max().item(), live.abs().max().item()
    tolerance *= max(scale, 1.0)
    if not gap <= tolerance:
        raise CheckpointFault(
            f"{path}: the reloaded model's logits differ from the live ones by {gap:.2g}, more than "
            f"{tolerance:.2g}; the saved weights are not the trained ones."
        )
