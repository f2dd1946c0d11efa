"""What a request passes before anything of it is read as JSON: who asks, from where, and how much."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import re
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import h11
import orjson
import uvicorn
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from baichuan_sft.infer.server_types import Refusal

MAX_HEADER_BYTES = 16 * 1024
MAX_UNREAD_BYTES = 64 * 1024  # of one request's head that has not ended; h11 gives up on it
MAX_VALUES = 2**14  # in all objects and lists; each wrong one costs a message
MAX_NESTING = 32  # a request needs 5
MAX_DISCARDED = 32 * 2**20  # of a body that is refused
READ_SECONDS = 30.0  # for a request's head, and again for its body
OPEN_PATHS = {"/health"}


@dataclass(frozen=True)
class Limits:
    """
    Attributes:
        hosts: names by which clients may call this server, without port; "*" allows any numeric address.
        origins: of web pages that may call it, ``https://name`` each; without one no page may.
        token: what a client must show; None where none is asked for.
    """

    hosts: frozenset[str]
    origins: frozenset[str] = frozenset()
    token: str | None = None
    max_body: int = 2**20


class Gate:
    """ASGI middleware: refuses, counts answers by status, and hands on a whole body."""

    def __init__(self, app: Any, limits: Limits, answers: Counter[int]):
        self.app, self.limits, self.answers = app, limits, answers

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.answers[message["status"]] += 1
            await send(message)

        try:
            check_head(scope, self.limits)
            body = await read_body(receive, self.limits.max_body)  # of a GET too: it may be slow
        except Refusal as refusal:
            refusal.headers["connection"] = "close"
            await discard(receive)
            return await respond(refusal)(scope, receive, counted)
        if scope["method"] == "POST":
            try:
                check_json(body)
            except Refusal as refusal:
                return await respond(refusal)(scope, receive, counted)
        await self.app(scope, replay(body, receive), counted)


def respond(refusal: Refusal) -> JSONResponse:
    return JSONResponse(refusal.body, refusal.status, headers=refusal.headers)


def check_head(scope: Any, limits: Limits) -> None:
    """
    Raises:
        Refusal: 431, 403, 401, 415, 413 or 400, in this order.
    """
    headers = Headers(scope=scope)
    size = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
    size += len(scope.get("raw_path") or b"") + len(scope["query_string"])
    if size > MAX_HEADER_BYTES:
        raise Refusal(431, "headers_too_large", f"the head of a request may have {MAX_HEADER_BYTES} bytes")
    # A page whose name was rebound to this address still says its own name.
    if not _allowed(headers.get("host", ""), limits.hosts):
        raise Refusal(403, "host_not_allowed", "this name of the server is not in its --allow_host list")
    origin = headers.get("origin")
    if origin is not None and origin not in limits.origins:
        raise Refusal(403, "origin_not_allowed", "this web page is not in the server's --allow_origin list")
    if limits.token is not None and scope["path"] not in OPEN_PATHS and scope["method"] != "OPTIONS":
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # In constant time: == would tell, by its time, how much of a guess is right.
        same = hmac.compare_digest(given.strip().encode(), limits.token.encode())
        if scheme.lower() != "bearer" or not same:
            message = "a valid token is needed: Authorization: Bearer ..."
            raise Refusal(401, "invalid_api_key", message, www_authenticate="Bearer")
    if scope["method"] != "POST":
        return
    kind, _, options = headers.get("content-type", "").lower().partition(";")
    charset = options.replace('"', "").replace(" ", "").partition("charset=")[2]
    if kind.strip() != "application/json" or charset not in ("", "utf-8") or "content-encoding" in headers:
        raise Refusal(415, "unsupported_media_type", "send application/json, in UTF-8, not compressed")
    length = headers.get("content-length", "0")
    if not length.isdecimal():
        raise Refusal(400, "invalid_content_length", "Content-Length is not a number of bytes")
    if len(length) > 18 or int(length) > limits.max_body:
        raise _too_large(limits.max_body)


def _too_large(max_body: int) -> Refusal:
    return Refusal(413, "body_too_large", f"a body may have {max_body} bytes")


def _allowed(host: str, hosts: frozenset[str]) -> bool:
    name = host.lower()
    name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
    if name in hosts:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return "*" in hosts


async def read_body(receive: Any, max_body: int) -> bytes:
    """
    Raises:
        Refusal: 413 larger, 408 slower, 400 cut off.
    """

    async def chunks() -> bytes:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Refusal(400, "incomplete_body", "the connection ended before the body did")
            body += message.get("body", b"")
            if len(body) > max_body:
                raise _too_large(max_body)
            if not message.get("more_body", False):
                return bytes(body)

    try:
        return await asyncio.wait_for(chunks(), READ_SECONDS)
    except asyncio.TimeoutError:
        raise Refusal(408, "timeout", f"the body did not arrive within {READ_SECONDS:.0f} s") from None


async def discard(receive: Any) -> None:
    """Read on, a while: of a connection closed with unread bytes the client would never see the answer."""

    async def rest() -> None:
        size, more = 0, True
        while more and size < MAX_DISCARDED:
            message = await receive()
            size += len(message.get("body", b""))
            more = message.get("more_body", False)

    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(rest(), READ_SECONDS)


def check_json(body: bytes) -> None:
    """
    Raises:
        Refusal: 400, not JSON in UTF-8 (RFC 8259: no NaN, no lone surrogate), too deep or too many values.
    """
    try:
        level, num_values = _containers([orjson.loads(body)]), 0
    except orjson.JSONDecodeError as error:
        if not re.search("depth|recursion", error.msg, re.IGNORECASE):  # orjson reads 1024 levels
            raise Refusal(400, "invalid_json", f"the body is not JSON in UTF-8: {error.msg}") from None
    else:
        for _ in range(MAX_NESTING):
            if not level:
                return
            num_values += sum(map(len, level))
            if num_values > MAX_VALUES:
                raise Refusal(400, "too_many_values", f"the body has more than {MAX_VALUES} values")
            level = [inner for one in level for inner in _containers(one)]
        if not level:
            return
    raise Refusal(400, "nesting", f"the body is nested deeper than {MAX_NESTING} levels")


def _containers(value: Any) -> list[Any]:
    children = value.values() if isinstance(value, dict) else value
    return [child for child in children if isinstance(child, list | dict)]


def replay(body: bytes, receive: Any) -> Any:
    """A ``receive`` that gives the whole body first, and then what the connection says: that it ended."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Any:
        return messages.pop() if messages else await receive()

    return again


class Protocol(H11Protocol):
    """uvicorn's, which waits for ever for the end of a request's head, and says 400 in plain text."""

    head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._time_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._time_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _time_head(self) -> None:
        """Run the clock from a head's first byte, or the connection's beginning, to its last."""
        if self.conn.their_state is not h11.IDLE:
            self._stop_timer()
        elif self.head_timer is None:
            self.head_timer = self.loop.call_later(READ_SECONDS, self.transport.close)

    def _stop_timer(self) -> None:
        if self.head_timer is not None:
            self.head_timer.cancel()
            self.head_timer = None

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # the answer has begun
            return self.transport.close()
        # h11 tells 431 from 400 in the buffer that it gave up on.
        large = len(self.conn.trailing_data[0]) > MAX_UNREAD_BYTES
        refusal = Refusal(431 if large else 400, "headers_too_large" if large else "invalid_http", msg)
        response = respond(refusal)
        head = [*response.raw_headers, (b"connection", b"close")]
        for event in (
            h11.Response(status_code=refusal.status, headers=head),
            h11.Data(data=bytes(response.body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class Server(uvicorn.Server):
    """Ends the answers before the connections: uvicorn would wait, then cut each off with a traceback."""

    def __init__(self, app: Any, end_answers: Callable[[], None]):
        self.end_answers = end_answers
        config = uvicorn.Config(
            app,
            http=Protocol,
            ws="none",
            h11_max_incomplete_event_size=MAX_UNREAD_BYTES,
            access_log=False,  # queries and addresses are nobody's business
            log_level="warning",
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=5,
        )
        super().__init__(config)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await asyncio.to_thread(self.end_answers)
        await super().shutdown(sockets)
