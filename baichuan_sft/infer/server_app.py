"""The endpoints: OpenAI's requests to jobs of the engine, and their pieces to OpenAI's answers."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import orjson
from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from baichuan_sft.infer.server_engine import Engine
from baichuan_sft.infer.server_gate import Gate, Limits, respond
from baichuan_sft.infer.server_jobs import Job, Piece, prepared
from baichuan_sft.infer.server_types import (
    ChatRequest,
    CompletionRequest,
    ErrorBody,
    Refusal,
    Request,
    refusal_of,
)
from baichuan_sft.infer.server_wire import SHAPES, Shape
from baichuan_sft.model.chat_baichuan import DEFAULT_MAX_NEW_TOKENS, _stop_ids, build_chat_input
from baichuan_sft.model.chat_template_baichuan import EOS_TOKEN_ID

WHOLE = 2**40  # a room that no conversation fills, so that build_chat_input drops no turn
ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {}, "text/event-stream": {}}},
    "4XX": {"model": ErrorBody, "description": "Refused, with the reason in OpenAI's error object"},
}


def build_app(engine: Engine, limits: Limits) -> Any:
    """The ASGI application; it starts the engine and closes it."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await run_in_threadpool(engine.close)

    # No docs pages: they would load scripts from another site.
    app = FastAPI(title="baichuan-sft", lifespan=lifespan, docs_url=None, redoc_url=None)
    started, answers = int(time.time()), Counter[int]()

    @app.post("/v1/chat/completions", responses=ANSWERS)
    async def chat_completions(body: ChatRequest, http: HttpRequest) -> Any:
        return await answer(
            engine, body, http, SHAPES["chat"], await run_in_threadpool(chat_jobs, engine, body)
        )

    @app.post("/v1/completions", responses=ANSWERS)
    async def completions(body: CompletionRequest, http: HttpRequest) -> Any:
        return await answer(
            engine, body, http, SHAPES["text"], await run_in_threadpool(text_jobs, engine, body)
        )

    @app.get("/v1/models")
    async def models() -> Any:
        fixed = {"object": "model", "created": started, "owned_by": "baichuan-sft"}
        return {"object": "list", "data": [{"id": name, **fixed} for name in engine.adapters]}

    @app.get("/health")
    async def health() -> Any:
        alive = engine.is_alive()
        return JSONResponse({"status": "ok" if alive else "the engine has ended"}, 200 if alive else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> str:
        return metrics_text(engine, answers)

    @app.exception_handler(Refusal)
    async def refused(_: HttpRequest, refusal: Refusal) -> JSONResponse:
        return respond(refusal)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: HttpRequest, error: RequestValidationError) -> JSONResponse:
        return respond(refusal_of(list(error.errors()), error.body))

    @app.exception_handler(HTTPException)
    async def routing(_: HttpRequest, error: HTTPException) -> JSONResponse:
        headers = {name.lower(): value for name, value in (error.headers or {}).items()}
        return respond(Refusal(error.status_code, "http_error", str(error.detail), **headers))

    @app.exception_handler(Exception)
    async def bug(_: HttpRequest, error: Exception) -> JSONResponse:
        return respond(Refusal(500, "internal_error", "an error in the server, its log says which"))

    app.add_middleware(Gate, limits=limits, answers=answers)
    if limits.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=sorted(limits.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # OpenAI's client for pages sends a dozen of its own
        )
    return app


# --- requests to jobs -------------------------------------------------------------------------------


def chat_jobs(engine: Engine, body: ChatRequest) -> list[Job]:
    """
    Raises:
        Refusal: turns that the chat format has no place for, or too many tokens.
    """
    for i, message in enumerate(body.messages):
        if message.role == "system" and i > 0:
            raise _invalid(f"messages[{i}].role", "a system message can only be the first")
    last = len(body.messages) - 1
    if body.messages[last].role != "user":
        raise _invalid(f"messages[{last}].role", "the last message must be the user's")
    if body.top_logprobs is not None and not body.logprobs:
        raise _invalid("top_logprobs", "needs logprobs: true")
    given = {n for n in (body.max_tokens, body.max_completion_tokens) if n is not None}
    if len(given) > 1:
        raise _invalid("max_completion_tokens", "differs from max_tokens, which means the same")
    turns = [{"role": message.role, "content": message.text()} for message in body.messages]
    ids = build_chat_input(engine.tokenizer, turns, model_max_length=WHOLE, max_new_tokens=0)
    tops = (body.top_logprobs or 0) if body.logprobs else None
    return _jobs(engine, body, [ids], max(given, default=None), tops, chat=True)


def text_jobs(engine: Engine, body: CompletionRequest) -> list[Job]:
    """
    Raises:
        Refusal: a prompt without a token, too many tokens or choices.
    """
    prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    ids = engine.tokenizer.encode_texts(prompts)
    if not all(ids):
        raise _invalid("prompt", "has no token")
    return _jobs(engine, body, ids, body.max_tokens or 16, body.logprobs, chat=False)


def _jobs(
    engine: Engine, body: Request, prompts: list[list[int]], *rest: int | None, chat: bool
) -> list[Job]:
    """What both endpoints check, and the job of each prompt; ``rest`` as in ``_job``."""
    if body.model not in engine.adapters:
        known = ", ".join(engine.adapters)
        raise Refusal(404, "model_not_found", f"there is no such model. Served: {known}.", param="model")
    if body.stream_options is not None and not body.stream:
        raise _invalid("stream_options", "needs stream: true")
    n = body.n or 1
    if len(prompts) * n > engine.max_batch:
        raise _invalid("n", f"prompts times n may be {engine.max_batch} here (--max_batch)")
    return [_job(engine, body, ids, i * n, *rest, chat=chat) for i, ids in enumerate(prompts)]


def _job(
    engine: Engine,
    body: Request,
    ids: list[int],
    first: int,
    wanted: int | None,
    tops: int | None,
    *,
    chat: bool,
) -> Job:
    """The job of one prompt, its choices counted from ``first``.

    Without ``max_tokens`` an answer may be as long as ``model.chat`` makes it, or as the context has room.
    """
    settings, room = engine.settings[body.model], engine.context_length - len(ids)
    if room < (wanted or 1):
        raise Refusal(
            400,
            "context_length_exceeded",
            f"the prompt has {len(ids)} tokens and the answer at least {wanted or 1}, the model's context "
            f"{engine.context_length}",
            param="max_tokens" if wanted and room > 0 else "messages" if chat else "prompt",
        )
    eos = settings.eos_token_id
    config = prepared(
        engine.model,
        settings,
        **body.sampling(),
        max_new_tokens=wanted or min(settings.max_new_tokens or DEFAULT_MAX_NEW_TOKENS, room),
        eos_token_id=_stop_ids(eos)
        if chat
        else sorted({EOS_TOKEN_ID, *([eos] if isinstance(eos, int) else eos or [])}),
    )
    return Job(
        body.model,
        ids,
        config,
        deliver=print,  # set by ``answer``
        n=body.n or 1,
        first_index=first,
        seed=body.seed,
        stop=body.stops(),
        top_logprobs=tops,
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
    )


def _invalid(param: str, message: str) -> Refusal:
    return Refusal(400, "invalid_value", f"{param}: {message}", param=param)


# --- pieces to answers ------------------------------------------------------------------------------


async def answer(engine: Engine, body: Request, http: HttpRequest, shape: Shape, jobs: list[Job]) -> Any:
    """Run the jobs and answer, whole or streamed; they end when the client goes.

    Raises:
        Refusal: 429, the queue is full; 503, the server is shutting down; 500, generation failed.
    """
    pieces: asyncio.Queue[Piece | Refusal] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def deliver(piece: Piece | Refusal) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, nobody reads
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

    for job in jobs:
        job.deliver = deliver
    engine.submit(jobs)
    fixed = {"id": f"{shape.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
    whole = _until_finished(pieces, jobs)
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        events = shape.stream(fixed, whole, jobs, usage)
        return EventStream(events, jobs)
    watcher = asyncio.create_task(_cancel_when_gone(http, jobs, pieces))
    try:
        return JSONResponse(shape.whole(fixed, [piece async for piece in whole], jobs))
    finally:
        watcher.cancel()
        _cancel(jobs)


async def _until_finished(pieces: asyncio.Queue[Piece | Refusal], jobs: list[Job]) -> AsyncIterator[Piece]:
    """
    Raises:
        Refusal: the engine gave a job up.
    """
    left = sum(job.n for job in jobs)
    while left:
        piece = await pieces.get()
        if isinstance(piece, Refusal):
            raise piece
        left -= piece.finish is not None
        yield piece


class EventStream(StreamingResponse):
    """Server-sent events; the jobs end with it, even where the client goes before the first one."""

    def __init__(self, events: AsyncIterator[Any], jobs: list[Job]) -> None:
        super().__init__(_lines(events), media_type="text/event-stream")
        self.jobs = jobs

    async def __call__(self, *channel: Any) -> None:
        try:
            await super().__call__(*channel)
        finally:
            _cancel(self.jobs)


async def _lines(events: AsyncIterator[Any]) -> AsyncIterator[bytes]:
    try:
        async for event in events:
            yield b"data: " + orjson.dumps(event) + b"\n\n"
        yield b"data: [DONE]\n\n"
    except Refusal as refusal:
        yield b"data: " + orjson.dumps(refusal.body) + b"\n\n"


async def _cancel_when_gone(http: HttpRequest, jobs: list[Job], pieces: asyncio.Queue[Any]) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
    _cancel(jobs)
    # The engine says nothing of a cancelled job, and the handler would wait for ever.
    pieces.put_nowait(Refusal(400, "client_gone", "the connection ended before the answer"))


def _cancel(jobs: list[Job]) -> None:
    for job in jobs:
        job.cancelled = True


def metrics_text(engine: Engine, answers: Counter[int]) -> str:
    """Prometheus' text format 0.0.4."""
    counted = ("prompt_tokens", "generated_tokens", "cancelled", "failed")
    families = [
        ("requests_total", "counter", {f'{{code="{code}"}}': n for code, n in sorted(answers.items())}),
        *((f"{what}_total", "counter", {"": engine.counts[what]}) for what in counted),
        ("running", "gauge", {"": engine.num_running}),
        ("waiting", "gauge", {"": engine.num_waiting}),
    ]
    lines = []
    for what, kind, values in families:
        lines.append(f"# TYPE baichuan_sft_{what} {kind}")
        lines += [f"baichuan_sft_{what}{labels} {value}" for labels, value in values.items()]
    return "\n".join(lines) + "\n"
