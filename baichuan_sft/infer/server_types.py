"""What a request may say: strict types, every number bounded, unknown fields refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

MAX_N = 8
MAX_STOP = 4
MAX_TOP_LOGPROBS = 20
GREEDY_BELOW = 1e-5  # logits divided by less run out of fp32

Text = Annotated[str, StringConstraints(strict=True)]
Stop = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=256)]


class Strict(BaseModel):
    # No option is accepted and ignored: "0.5" is no number, 1 is no boolean, NaN is nothing at all.
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class TextPart(Strict):
    type: Literal["text"]
    text: Text


class ChatMessage(Strict):
    role: Literal["system", "user", "assistant"]
    content: Text | list[TextPart]

    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(p.text for p in self.content)


class StreamOptions(Strict):
    include_usage: bool = False


class TextFormat(Strict):
    type: Literal["text"]


class Request(Strict):
    """What both endpoints take. ``top_k`` and ``repetition_penalty`` are not OpenAI's but the family's."""

    model: Text
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOP)] | None = None
    user: Annotated[str, StringConstraints(strict=True, max_length=256)] | None = None

    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def sampling(self) -> dict[str, Any]:
        """By the names of ``GenerationConfig``; a temperature of about 0 is greedy."""
        names = ("temperature", "top_p", "top_k", "repetition_penalty")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.temperature is not None and self.temperature < GREEDY_BELOW:
            return {**given, "do_sample": False}
        return {**given, "do_sample": True} if given.keys() - {"repetition_penalty"} else given


class ChatRequest(Request):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: TextFormat | None = None


class CompletionRequest(Request):
    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_N)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: Literal[False] | None = None


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


class Refusal(Exception):
    """A request that is refused: its status, and what OpenAI's error object says."""

    def __init__(self, status: int, code: str, message: str, *, param: str | None = None, **headers: str):
        super().__init__(message)
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        kind = "server_error" if status >= 500 else KINDS.get(status, "invalid_request_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def refusal_of(errors: list[dict[str, Any]], body: Any) -> Refusal:
    """The first and deepest of what pydantic found wrong, without the value itself.

    Of a field that may be of several types each has its error; the deepest is the one that was meant.
    """
    paths = [(_path(error["loc"][1:], body), error["msg"]) for error in errors]
    depth = max(len(path) for path, _ in paths)
    path, message = next((path, message) for path, message in paths if len(path) == depth)
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part[:64]}" for part in path).lstrip(".")
    param = ascii(name)[1:-1] or None
    return Refusal(400, "invalid_value", f"{param or 'body'}: {message}", param=param)


def _path(location: tuple[str | int, ...], body: Any) -> list[str | int]:
    """The part of a pydantic location that names a place in the body; types it tried are left out."""
    path: list[str | int] = []
    for part in location:
        inside = isinstance(body, list) and isinstance(part, int) and part < len(body)
        if inside or (isinstance(body, dict) and isinstance(part, str)):
            path.append(part)
            body = body[part] if inside or part in body else None
    return path
