"""Data loader workers that the kernel ended, as the error tells that it brings about."""

from __future__ import annotations

import re
import traceback

# What torch says once it has seen that one is gone.
NAMED = re.compile(r"DataLoader worker \(pid(\(s\))? [\d, ]+\)")


def lost_worker(error: Exception) -> str | None:
    """The worker whose end brought ``error`` about; None where it was something else.

    A batch is fetched over a socket of its worker's. For a moment that socket is broken while the worker
    still counts as alive, and torch passes on what the socket says.
    """
    if named := NAMED.search(str(error)):
        return named[0]
    fetching = any(frame.name == "_try_get_data" for frame in traceback.extract_tb(error.__traceback__))
    broken = isinstance(error, (ConnectionError, FileNotFoundError, EOFError))  # not a lack of descriptors
    return "a DataLoader worker" if fetching and broken else None
