"""A progress bar with the time left, for whatever takes longer than two seconds."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

QUIET_SECONDS, LINE_SECONDS = 2, 10


class Progress:
    """Counts towards ``total`` on stderr: a bar on a terminal, a line every ten seconds elsewhere.

    Nothing is shown of what ends within two seconds, and by one process of each host only.

    Args:
        label: what is done ("checking train.jsonl").
        total: bytes of the whole, 0 where nobody knows.
    """

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total = label, total
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
        if now - self.started < QUIET_SECONDS or os.environ.get("LOCAL_RANK", "0") != "0":
            return
        if sys.stderr.isatty():
            bar = self._bar()
            bar.update(self.task, completed=done)
        elif now >= self.next_line and done:
            share, left = done / self.total if self.total else 0, now - self.started
            what = f"{share:.0%}, {left * (1 - share) / share:.0f} s left" if share else f"{done >> 20} MiB"
            print(f"{self.label}: {what}", file=sys.stderr, flush=True)
            self.next_line = now + LINE_SECONDS

    def _bar(self):
        if self.bar is None:
            from rich.console import Console
            from rich.markup import escape
            from rich.progress import Progress as Bar

            self.bar = Bar(console=Console(stderr=True))
            self.bar.start()
            self.task: Any = self.bar.add_task(escape(self.label), total=self.total or None)
        return self.bar
