"""What `launch` itself says: on stderr, apart from what rank 0 says, which goes to stdout."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from typing import TextIO

from baichuan_sft.launch.outcome import Failure

BOLD, RED, DIM, END = "\033[1m", "\033[31m", "\033[2m", "\033[0m"
DETAIL_LINES = 25


def say(text: str = "", *styles: str) -> None:
    plain = os.environ.get("NO_COLOR") or not sys.stderr.isatty()
    _write(sys.stderr, (text if plain else "".join(styles) + text + END) + "\n")


def note(text: str) -> None:
    say(f"launch: {text}", DIM)


def show_output(text: str) -> None:
    """Rank 0's words, as they come."""
    _write(sys.stdout, text)


def _write(stream: TextIO, text: str) -> None:
    try:
        stream.write(text)
        stream.flush()
    except OSError:  # nobody reads any more; the logs have it all, and training goes on
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "es" if what.endswith("s") else "s")


def table(rows: Sequence[Sequence[str]], indent: str = "  ") -> str:
    """Columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in rows]
    return "\n".join(indent + line.rstrip() for line in lines)


def banner(failure: Failure) -> None:
    """One failure: where, when, why, and where to read on."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 100)
    where = failure.host if failure.rank is None else f"{failure.host}, rank {failure.rank}"
    when = [f"phase {failure.phase}"] * bool(failure.phase)
    when += [] if failure.step is None else [f"step {failure.step}"]
    say("\n" + " run failed ".center(width, "="), RED, BOLD)
    say(f"{where}: {failure.message}", BOLD)
    say(", ".join([*when, f"exit code {failure.code}"]))
    lines = failure.detail.splitlines()
    if failure.detail.strip() not in ("", failure.message):
        cut = len(lines) - DETAIL_LINES
        say("")
        if cut > 0:
            say(f"  ... {cut} lines before these are in the log", DIM)
        say("\n".join(f"  {line}" for line in lines[-DETAIL_LINES:]))
    if failure.log:
        say(f"\nlog: {failure.log} on {failure.host}")
    say("=" * width, RED, BOLD)
