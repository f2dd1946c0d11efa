"""OpenAI's answers: chat completions and text completions, whole and as chunks of a stream."""

from __future__ import annotations

import codecs
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from baichuan_sft.infer.server_jobs import Job, Piece, Token

FLOOR = -9999.0  # OpenAI's word for a logarithm that JSON cannot hold


class Offsets:
    """Where each token of one choice begins, in characters; one counts with its last byte."""

    def __init__(self) -> None:
        self.decoder, self.size = codecs.getincrementaldecoder("utf-8")("replace"), 0

    def next(self, raw: bytes) -> int:
        at, self.size = self.size, self.size + len(self.decoder.decode(raw))
        return at


@dataclass(frozen=True)
class Shape:
    """How one endpoint writes its answers.

    Attributes:
        choice: the body of a whole choice, from its text; delta: that of a chunk, from its text.
        logprobs: of the tokens of a choice or a chunk, from them and where the next one begins.
        opening: the first chunk's delta, None where there is none.
    """

    prefix: str
    kind: str
    chunk_kind: str
    choice: Callable[[str], dict[str, Any]]
    delta: Callable[[str], dict[str, Any]]
    logprobs: Callable[[list[Token], Offsets], dict[str, Any]]
    opening: dict[str, Any] | None

    def whole(self, fixed: dict[str, Any], pieces: list[Piece], jobs: list[Job]) -> dict[str, Any]:
        choices = []
        for index in range(sum(job.n for job in jobs)):
            own = [piece for piece in pieces if piece.index == index]
            text = "".join(piece.text for piece in own)
            choices.append(
                {
                    "index": index,
                    **self.choice(text),
                    "logprobs": self._logprobs(own, jobs, Offsets()),
                    "finish_reason": own[-1].finish,
                }
            )
        return {**fixed, "object": self.kind, "choices": choices, "usage": usage(len(pieces), jobs)}

    async def stream(
        self, fixed: dict[str, Any], pieces: AsyncIterator[Piece], jobs: list[Job], with_usage: bool
    ) -> AsyncIterator[dict[str, Any]]:
        fixed = {**fixed, "object": self.chunk_kind, **({"usage": None} if with_usage else {})}
        num_generated, offsets = 0, [Offsets() for job in jobs for _ in range(job.n)]

        def chunk(
            index: int, body: dict[str, Any], logprobs: Any = None, finish: Any = None
        ) -> dict[str, Any]:
            choice = {"index": index, **body, "logprobs": logprobs, "finish_reason": finish}
            return {**fixed, "choices": [choice]}

        if self.opening is not None:
            for index in range(len(offsets)):
                yield chunk(index, self.opening)
        async for piece in pieces:
            num_generated += 1
            logprobs = self._logprobs([piece], jobs, offsets[piece.index])
            if piece.text or piece.finish or piece.token:
                yield chunk(piece.index, self.delta(piece.text), logprobs, piece.finish)
        if with_usage:
            yield {**fixed, "choices": [], "usage": usage(num_generated, jobs)}

    def _logprobs(self, pieces: list[Piece], jobs: list[Job], offsets: Offsets) -> dict[str, Any] | None:
        if jobs[0].top_logprobs is None:
            return None
        return self.logprobs([piece.token for piece in pieces if piece.token], offsets)


def usage(num_generated: int, jobs: list[Job]) -> dict[str, int]:
    """In tokens; the one that ended an answer counts, it was generated."""
    prompt = sum(len(job.ids) for job in jobs)
    total = prompt + num_generated
    return {"prompt_tokens": prompt, "completion_tokens": num_generated, "total_tokens": total}


def _shown(raw: bytes) -> str:
    """Text, or OpenAI's word for bytes of half a character, so that two of them are not one key."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _entry(raw: bytes, logprob: float) -> dict[str, Any]:
    return {"token": _shown(raw), "logprob": max(logprob, FLOOR), "bytes": list(raw)}


def chat_logprobs(tokens: list[Token], offsets: Offsets) -> dict[str, Any]:
    entries = [
        {**_entry(t.raw, t.logprob), "top_logprobs": [_entry(*rival) for rival in t.top]} for t in tokens
    ]
    return {"content": entries, "refusal": None}


def text_logprobs(tokens: list[Token], offsets: Offsets) -> dict[str, Any]:
    return {
        "tokens": [_shown(token.raw) for token in tokens],
        "token_logprobs": [max(token.logprob, FLOOR) for token in tokens],
        "top_logprobs": [{_shown(raw): max(value, FLOOR) for raw, value in token.top} for token in tokens],
        "text_offset": [offsets.next(token.raw) for token in tokens],
    }


SHAPES = {
    "chat": Shape(
        prefix="chatcmpl",
        kind="chat.completion",
        chunk_kind="chat.completion.chunk",
        choice=lambda text: {"message": {"role": "assistant", "content": text}},
        delta=lambda text: {"delta": {"content": text} if text else {}},
        logprobs=chat_logprobs,
        opening={"delta": {"role": "assistant", "content": ""}},
    ),
    "text": Shape(
        prefix="cmpl",
        kind="text_completion",
        chunk_kind="text_completion",
        choice=lambda text: {"text": text},
        delta=lambda text: {"text": text},
        logprobs=text_logprobs,
        opening=None,
    ),
}
