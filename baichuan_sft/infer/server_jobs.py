"""What the endpoints ask of the engine, and what it gives back.

From logits to a token by the settings and arithmetic of ``generate``, so that both give one text.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from baichuan_sft.infer.server_types import Refusal


@dataclass(frozen=True)
class Token:
    """One generated token, the logarithm of its probability before any sampling setting, and its rivals'."""

    raw: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...]


@dataclass(frozen=True)
class Piece:
    """What one token added to one choice.

    Attributes:
        finish: None, "stop" or "length" with the last piece.
    """

    index: int
    text: str = ""
    token: Token | None = None
    finish: str | None = None


@dataclass
class Job:
    """One prompt and what is wanted of it.

    Attributes:
        config: generation settings in full; ``max_new_tokens`` fits the context beside ``ids``.
        seed: choice i samples from a stream of ``seed + i``; None takes a random one.
        deliver: called from the engine's thread with each piece, or with the error that ended the job.
        cancelled: set by anyone; the rows leave before the next token.
    """

    model: str
    ids: list[int]
    config: GenerationConfig
    deliver: Callable[[Piece | Refusal], None]
    n: int = 1
    first_index: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    cancelled: bool = False


def choose(
    config: GenerationConfig,
    processors: Any,
    generator: torch.Generator,
    ids: torch.Tensor,
    logits: torch.Tensor,
) -> torch.Tensor:
    """The next token id, a scalar, after ``ids`` from fp32 logits ``(V,)``: as ``generate`` does it.

    -1 where a NaN leaves no choice: drawing from it would end the process's use of a GPU.
    """
    scores = processors(ids[None], logits[None])
    if config.do_sample:
        scores = scores.softmax(dim=-1)
        chosen = torch.multinomial(scores.nan_to_num(1.0), 1, generator=generator)[0, 0]
    else:
        chosen = scores.argmax(dim=-1)[0]
    return torch.where(scores.isnan().any(), -1, chosen)


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
