"""From logits to a token, by the settings and arithmetic of ``generate``, so that both give one text."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig


def choose(
    config: GenerationConfig,
    processors: Any,
    generator: torch.Generator,
    ids: torch.Tensor,
    logits: torch.Tensor,
) -> torch.Tensor:
    """The next token id, a scalar, after ``ids`` from fp32 logits ``(V,)``: as ``generate`` does it."""
    scores = processors(ids[None], logits[None])
    if not config.do_sample:
        return scores.argmax(dim=-1)[0]
    return torch.multinomial(scores.softmax(dim=-1), 1, generator=generator)[0, 0]


def logits_processors(model: Any, config: GenerationConfig, num_prompt: int) -> Any:
    """What ``generate`` would do to the logits under these settings, so that both give the same text."""
    return model._get_logits_processor(config, input_ids_seq_length=num_prompt, device=model.device)


def prepared(model: Any, config: GenerationConfig, **changes: Any) -> GenerationConfig:
    """``config`` with ``changes``, and what neither says filled in as ``generate`` fills it.

    Args:
        changes: ``eos_token_id``, a list, and ``max_new_tokens`` are always given.
    """
    config = copy.deepcopy(config)
    config.update(**changes)
    if not config.do_sample:  # as ``model.chat``
        config.update(temperature=1.0, top_p=1.0, top_k=50)
    config, _ = model._prepare_generation_config(config)
    model._prepare_special_tokens(config, kwargs_has_attention_mask=True, device=model.device)
    return config


@dataclass(frozen=True)
class Penalties:
    """OpenAI's: per occurrence, and once for each token that occurred, in the answer so far."""

    num_prompt: int
    frequency: float
    presence: float

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        counts = torch.bincount(ids[0, self.num_prompt :], minlength=scores.shape[-1])
        return scores - self.frequency * counts - self.presence * (counts > 0)
