"""A progress bar with the time left, for whatever takes longer than two seconds."""

from __future__ import annotations

import sys
import time
from typing import Any

QUIET_SECONDS, LINE_SECONDS = 2, 10


class Progress:
    """Counts towards ``total`` on stderr: a bar on a terminal, a line every ten seconds elsewhere.

    Nothing is shown of what ends within two seconds.

    Args:
        label: what is done ("checking train.jsonl").
        total: bytes, or other units, of the whole.
    """

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total = label, max(total, 1)
        self.started = time.monotonic()
        self.next_line = self.started + LINE_SECONDS
        self.bar: Any = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def update(self, done: int) -> None:
        """``done`` of ``total`` are behind us."""
        now = time.monotonic()
        if now - self.started < QUIET_SECONDS:
            return
        if sys.stderr.isatty():
            bar = self._bar()
            bar.update(self.task, completed=done)
        elif now >= self.next_line and done:
            left = (now - self.started) * (self.total - done) / done
            print(f"{self.label}: {done / self.total:.0%}, {left:.0f} s left", file=sys.stderr, flush=True)
            self.next_line = now + LINE_SECONDS

    def _bar(self):
        if self.bar is None:
            from rich.console import Console
            from rich.progress import Progress as Bar

            self.bar = Bar(console=Console(stderr=True))
            self.bar.start()
            self.task: Any = self.bar.add_task(self.label, total=self.total)
        return self.bar
