"""What the endpoints ask of the engine, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import GenerationConfig


class Busy(Exception):
    """The queue is full."""


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
        count: tokens this piece stands for, 0 or 1.
    """

    index: int
    text: str = ""
    count: int = 1
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
    deliver: Callable[[Piece | Exception], None]
    n: int = 1
    first_index: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    cancelled: bool = False
