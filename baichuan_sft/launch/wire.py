"""What launcher and agent say to each other: JSON objects, one per line, beats both ways."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import deque
from typing import Any

BEAT = 2.0  # seconds between two signs of life
JUMP = 5.0  # a loop that turned later than this was itself stopped: the silence is its own
MAX_PENDING = 1 << 20  # bytes waiting to be sent; past it the screen's text is dropped, never an event

Message = dict[str, Any]


class Wire:
    """One end of a connection over two file descriptors; neither direction ever blocks."""

    def __init__(self, source: int, target: int) -> None:
        self.source, self.target = source, target
        for descriptor in (source, target):
            os.set_blocking(descriptor, False)
        self.heard = self.said = self.turned = time.monotonic()
        self.ended = False  # the other end is gone
        self.last_unread: deque[str] = deque(maxlen=5)  # lines that are no message, such as a login banner
        self._received, self._pending = b"", bytearray()

    def send(self, message: Message) -> None:
        if message.get("event") == "out" and len(self._pending) > MAX_PENDING:
            return
        self._pending += json.dumps(message).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        with contextlib.suppress(BlockingIOError):
            try:
                while self._pending:
                    del self._pending[: os.write(self.target, self._pending[:65536])]
            except ConnectionError:  # what the other end said last may still be there to read
                self._pending.clear()

    def drain(self, seconds: float) -> None:
        """Send what is pending before the end, as far as the other end takes it in that time."""
        limit = time.monotonic() + seconds
        while self._pending and not self.ended and time.monotonic() < limit:
            time.sleep(0.05)
            self.flush()

    def read(self) -> list[Message]:
        """The messages that have arrived; an empty list says nothing about the other end, ``ended`` does."""
        with contextlib.suppress(BlockingIOError):
            try:
                data = os.read(self.source, 1 << 20)
            except ConnectionError:
                data = b""
            if data:
                self.heard = time.monotonic()
            else:
                self.ended = True
            *lines, self._received = (self._received + data).split(b"\n")
            return [message for line in lines if (message := self._parse(line)) is not None]
        return []

    def _parse(self, line: bytes) -> Message | None:
        with contextlib.suppress(ValueError):
            message = json.loads(line)
            if isinstance(message, dict):
                return message
        self.last_unread.append(line.decode(errors="replace").strip())
        return None

    def beat(self, message: Message) -> None:
        """Say ``message`` where the last sign of life is old enough."""
        now = time.monotonic()
        if now - self.said >= BEAT:
            self.said = now
            self.send(message)

    def silent_for(self) -> float:
        """Seconds without a word from the other end, while this end was awake."""
        now = time.monotonic()
        if now - self.turned > JUMP:
            self.heard = now
        self.turned = now
        return now - self.heard
